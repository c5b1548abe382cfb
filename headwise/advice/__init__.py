"""The settings of other programs that fit a model and these cards: computed by the planner, each with its reason; torch-free."""
