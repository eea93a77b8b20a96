"""Names of `xformers` that towers use, by Sensorium's attention."""
