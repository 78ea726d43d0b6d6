"""Meta-learning, tracked. Floors; imports point down only.

5  train evaluate ui cli       the commands, each a `run(cfg)`
4  compose config scoreboard   configurations to parts; test sets to tables
tracking                    the only module that imports mlflow
3  learners/* progress         support set to classifier (Lightning modules)
2  data/datamodule             three class-disjoint splits to three loaders
1  backbones metrics figures   networks, metrics, plots
data/*                      image pools, class splits, episodes
0  episode functional          the shapes of a task; pure maths
annotations errors
"""
