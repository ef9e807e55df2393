"""Training configurations that exist already: DeepSpeed's JSON, accelerate's YAML, or the command that starts a run.

Each reader turns its format into :class:`~advisor.catalog.training_config.settings.Settings`, in the words of the
command line; :mod:`~advisor.catalog.training_config.read` tells the formats apart.
"""
