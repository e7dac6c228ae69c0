"""Engines that run exports, each from an environment of its own: nothing here imports one."""
