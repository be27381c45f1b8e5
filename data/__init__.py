"""The four scripts are the method: model.py, masking.py, train.py, glue.py. This folder is plumbing
that a first reading may skip: text in, files out, the machine. One noun a file.

Nothing here decides what is masked or learned, and nothing but inspection.py imports a script.
"""
