"""Programs around ssd_object_detection.py, one a job: run each with `python -m ssd_tools.NAME`."""
