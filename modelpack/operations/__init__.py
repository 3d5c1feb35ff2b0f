"""The operations behind the commands, one file a verb; transfer.py moves models for all of them.

Every long call takes `progress=`, called with `modelpack.progress.Progress` reports, and `stop=`,
through which another thread can cancel it.
"""
