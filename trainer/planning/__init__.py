"""What a run will take, before a rank is started: `launch/train.py --plan`.

machines        ranks, hosts, devices and links, as they are or as they are assumed
batch_load      what a step brings to a rank: users, interactions, rows, by the dataset's lengths
trial           the dense model on some users of a batch, in this process: memory, operations, seconds
host_memory     what this process has of memory, and had at most
memory          what a rank takes of its device and its host, part by part
traffic         what a rank sends in a step, by formula
step_model      seconds of a step, fitted on measured ones, and on other machines
prediction      a whole plan: memory, bytes, messages, seconds, and what limits the step
report          a plan as tables
command         what `--plan` does

dataset ──▶ batch_load ──▶ trial ──▶ memory, traffic, step_model ──▶ prediction ──▶ report
"""
