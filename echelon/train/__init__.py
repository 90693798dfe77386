"""Training: learners, checkpoints, logs, and how several processes become one."""
