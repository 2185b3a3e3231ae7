"""Several processes that share one run; `torch.distributed` carries what they tell each other.

All processes make the same calls in the same order, on the same model, data and options, and all
return the same. Work is divided in two ways, and the result has the same bits however many there
are:

- Sums over data are formed by parts: runs of consecutive batches, whose number depends on the data
  alone. Each part is summed on its own, and the sums are added in the order of the parts, by each
  process. One process alone does the same, one part after the other.
- Layers whose inputs are known have owners, balanced by cost. An owner makes the layer and sends it
  to all others.

| file | does |
|---|---|
| `processes.py` | the group: who fails ends all; results in order, and shared by cost |
| `sending.py` | one object with its tensors from one process to all |
| `parts.py` | which batches are summed together |
"""
