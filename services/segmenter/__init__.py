"""Segmenter: a Celery worker around world2act.segmentation. `python -m services.segmenter` starts it."""
