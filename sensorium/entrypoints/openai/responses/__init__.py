"""`/v1/responses`: items in, items out, and what was said before kept for a while.

body -> items -> conversation -> the engine -> output -> events, or the response as a whole -> store
"""
