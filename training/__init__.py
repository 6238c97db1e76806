"""The run that makes a checkpoint: the step, its log, its pictures."""
