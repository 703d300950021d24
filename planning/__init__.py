"""What a pipeline will do before it is run, and which pipeline meets a budget."""

from .plan import Plan, PlannedPass, plan

__all__ = ["Plan", "PlannedPass", "plan"]
