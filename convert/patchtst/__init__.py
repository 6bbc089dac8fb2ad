"""PatchTST in and out: gPatchTST's, the official programs', and that of transformers.

All are read under gPatchTST's names, and gPatchTST's files are written.
"""
