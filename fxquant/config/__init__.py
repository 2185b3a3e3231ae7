"""What the caller wants, as values: no model and no data are needed to make or check them.

| file | does |
|---|---|
| `quant_config.py` | all that can be asked for, as one checked value; presets, recipe files |
| `option_checks.py` | which values each option may have |
| `targets.py` | what the formats of other runtimes can hold |
| `skip_rules.py` | which layers stay float: rules by type, by name and by parameter count |
| `memory.py` | how much memory a run may take: an amount as text, or a share of what is free |
| `method.py` | the name of a rounding method, taken apart into its steps |
"""
