"""What a job on many GPUs will hold, send, take and cost, before it is started: `aspo plan --gpus N`, docs/scaling.md.

hardware (published figures) + sharding (what each GPU holds and sends) + step_memory (what a step runs)
  -> job (time, GPU-hours, what is in the way) -> tables (docs/scaling.md)
"""
