"""One file per technique, named as in the field; each imports torch and the standard
library only.
"""
