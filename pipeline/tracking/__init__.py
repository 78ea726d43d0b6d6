"""Runs in MLflow; nothing else imports it. Floor 4.

Without MLFLOW_TRACKING_URI the store is `mlruns/mlflow.db` of the project, whatever the working
directory; PIPELINE_MLRUNS names another folder for it, the artifacts and the checkpoints.
"""
