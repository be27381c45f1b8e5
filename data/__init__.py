"""The four scripts are the method: model.py, masking.py, train.py, glue.py. This folder is plumbing
that a first reading may skip: text in, files out, the machine. One noun a file.

No file of it imports a script, but for inspection.py, which looks at what they do. (In results/ an
experiment may.)
"""
