"""A diagnosis of the machines before a run: each rank looks, all ranks measure, one judges.

deadline       what may hang is given some seconds
facts          what was found, as plain data
rank_probe     what a rank finds of its own process, host and device
data_probe     what a rank finds of the dataset, and how fast it reads shards
folder_probe   what hosts see of each other in the run's folder
network_probe  clocks, links by pair of hosts, collectives
examination    all of them, in turn, on all ranks
judgement      verdicts on what was found; needs no ranks
report         the table
"""
