"""The commands of ``mhc-tune``, one a file: help, options, and the call of what does the work, imported when it is called for."""
