"""The REST door: checks what comes in, hands work to the segmenter (Celery) and the trainer (jobs stream), shows the results."""
