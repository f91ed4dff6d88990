"""An env of one's own: the policy is to write a number backwards, and has three attempts. See README.md beside it."""

from skyrl_train.envs.base import Env, StepResult


class Backwards(Env):
    """The number is ``reward_spec.ground_truth`` of the row; the settings are ``environment.skyrl_gym.backwards``."""

    def init(self):
        """Called once. May be left out, which opens with the row's prompt, or ask for something and return messages."""
        self.wanted = self.prompt.extras["reward_spec"]["ground_truth"][::-1]
        self.attempts_left = self.settings.get("attempts", 3)
        return list(self.prompt.messages)

    def step(self, response):
        """Called with each completion. Raising costs this trajectory only, and so does taking too long."""
        self.attempts_left -= 1
        written = response.strip()
        right = sum(a == b for a, b in zip(written, self.wanted, strict=False))  # digits at their place
        if written == self.wanted:
            return StepResult(reward=1.0, terminated=True, metadata={"solved": True})
        if self.attempts_left == 0:
            return StepResult(reward=0.5 * right / len(self.wanted), terminated=True, metadata={"solved": False})
        return StepResult(observations=[{"role": "user", "content": f"{right} right"}])
