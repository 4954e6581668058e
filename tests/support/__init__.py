"""What tests share: pools of ranks, tiny models, made-up inputs."""
