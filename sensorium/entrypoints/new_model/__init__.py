"""`sensorium new-model`: the beginning of a model file, from what a Hugging Face config tells.

`anatomy` finds the parts of the model, their names in checkpoints, and what the processor makes of an item; `skeleton`
writes that as a file, with a mark wherever the author has to say something, and a test beside it.
"""
