"""The job table's history. `JobStore.open()` upgrades to the newest revision by itself.

A change of the table is a new file in `versions/` (`0002_what_it_does.py`, its `down_revision` the
one before) together with the column in `jobs.py`; a test compares the two.
"""
