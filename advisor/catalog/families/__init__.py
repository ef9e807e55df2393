"""A function per architecture family: a configuration's fields to the model that transformers 5.23 builds from them.

Defaults, parameter names, shapes and registration order follow ``transformers/models/<family>``; the tests hold
them against the model built on the meta device.
"""
