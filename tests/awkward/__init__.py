"""Small models with the habits that break quantizers: by kind, one file each."""

from tests.awkward import attributes as attributes
from tests.awkward import containers as containers
from tests.awkward import control as control
from tests.awkward import draws as draws
from tests.awkward import hooks as hooks
from tests.awkward import inplace as inplace
from tests.awkward import inputs as inputs
from tests.awkward import linears as linears
from tests.awkward import loops as loops
from tests.awkward import magic as magic
from tests.awkward import names as names
from tests.awkward import outputs as outputs
from tests.awkward import products as products
from tests.awkward import state as state
from tests.awkward import structure as structure
from tests.awkward import surroundings as surroundings
from tests.awkward import weights as weights
from tests.awkward.registry import CASES as CASES
