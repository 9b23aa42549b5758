"""The trainer: rollout coordinator (`python -m services.trainer rollout`) and jobs (`python -m services.trainer`).

The coordinator executes episodes; the jobs process runs posttrain, evaluate, rollout, imagine and stage1 jobs. They share only
streams and artifacts, so either can be killed, restarted or replicated alone.
"""
