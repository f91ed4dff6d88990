"""What a run tells: metrics, phases, trajectories and logs, in its folder and in the sinks the user asked for."""
