"""A diagnosis of the machines before a run: each rank looks, all ranks measure, one judges.

examination      all probes in turn, on all ranks
rank_probe       what a rank finds of its own process, host and device
data_probe       what a rank finds of the dataset, and how fast it reads shards
folder_probe     what hosts see of each other in the run's folder
network_probe    clocks, links by pair of hosts, collectives
deadline         what may hang is given some seconds
facts            what was found, as plain data
judgement        verdicts on what was found, which need no ranks: judge_ranks, judge_storage,
                 judge_network
verdict          a verdict, and how a check comes to its verdicts
units            numbers, seconds and rates, as a line has them
report           the table, and the same as JSON

probes ──▶ facts of all ranks ──▶ judgement ──▶ verdicts ──▶ table, JSON, exit status
"""
