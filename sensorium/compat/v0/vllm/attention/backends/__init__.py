"""Backends of V0: their classes exist for files that ask whether a batch is described by one of them. None is here."""
