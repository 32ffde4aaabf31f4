"""Imported once, by the server that tests fork processes from: what their commands need, some of it slow to come."""
# ruff: noqa: F401

import diffusers.models.transformers.transformer_wan
import jinja2
import matplotlib.figure
import peft
import rich.progress
import rich.table
import torch

import pgdpo_fast.analysis.report
import pgdpo_fast.cli.demo_stages
import pgdpo_fast.cli.encode
import pgdpo_fast.cli.flags
import pgdpo_fast.training.sweep
import tests.commands

torch.set_num_threads(1)
