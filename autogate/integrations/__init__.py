"""Ready-made parts for other libraries' training loops, each in a file that needs that library.

`autogate.integrations.lightning.GateCallback` prepares a network, finalizes it once the targets are met, and resumes.
"""
