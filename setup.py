"""Builds csrc/ into mtedit_fast._C; see pyproject.toml for everything else."""

from setuptools import setup

setup()
