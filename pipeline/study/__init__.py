"""Sweeps: many trainings, chosen by Optuna. Floor 5; nothing else imports optuna.

driver asks for trials and hands them to an executor (local processes, ray, slurm); each runs in
worker; storage keeps what they find and takes up those whose worker died; space and settings say
what is asked for, live and summary what came of it.
"""
