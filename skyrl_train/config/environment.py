"""The section ``environment``: what the policy acts in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

from skyrl_train.config.fields import key, section


@dataclass(slots=True, kw_only=True)
class Text2SQLConfig:
    """Settings of the env text2sql."""

    db_path: str | None = key(
        None, "Folder of the SQLite databases, as `skyrl data text2sql` writes it.", path=True,
        was="/home/ray/default/sql_data", why="a folder of one cluster image",
    )  # fmt: skip
    query_timeout: float = key(5.0, "Time for one query of the policy.", above=0, unit="seconds")


@dataclass(slots=True, kw_only=True)
class JudgeConfig:
    """Settings of skyrl-gym's env llm_as_a_judge."""

    model: str = key("gpt-4o-mini", "Model that judges.")
    base_url: str | None = key(None, "Address of its API; null: the client's default.")


@dataclass(slots=True, kw_only=True)
class SearchConfig:
    """Settings of skyrl-gym's env search."""

    log_requests: bool = key(False, "Log each request.")
    search_url: str = key("http://127.0.0.1:8000/retrieve", "Address of the retriever.")
    topk: int = key(3, "Documents a query returns.", minimum=1)
    timeout: float = key(30, "Time for one query.", above=0, unit="seconds")


@dataclass(slots=True, kw_only=True)
class EnvSettingsConfig:
    """One sub-section for each env, passed to it as its settings; any env name may be added."""

    OPEN: ClassVar[tuple[str, ...]] = ("others",)

    max_env_workers: int = key(32, "Env calls that run at the same time.", minimum=1)
    text2sql: Text2SQLConfig = section(Text2SQLConfig)
    llm_as_a_judge: JudgeConfig = section(JudgeConfig)
    search: SearchConfig = section(SearchConfig)
    others: dict[str, dict[str, Any]] = key({}, "Settings of further envs: environment.skyrl_gym.<env>.<setting>.")

    def settings(self, env_class: str) -> dict[str, Any]:
        """The settings of one env; empty if its sub-section is absent."""
        found = getattr(self, env_class, None) if env_class in ("text2sql", "llm_as_a_judge", "search") else None
        if found is not None and is_dataclass(found):
            return asdict(found)  # pyright: ignore[reportArgumentType]
        return dict(self.others.get(env_class, {}))


@dataclass(slots=True, kw_only=True)
class EnvironmentConfig:
    """The env of rows that name none, and the settings of all."""

    env_class: str = key(
        "gsm8k", "Env of the rows that name none: one of ours, a registered id, or package.module:Class."
    )
    timeout: float = key(60.0, "Time for one call of an env.", above=0, unit="seconds")
    skyrl_gym: EnvSettingsConfig = section(EnvSettingsConfig)
