"""Write the sensitivity page of the embedded model, which README shows.

    python examples/sensitivity_page.py page.html

Then open the page in a browser. `docs/images/sensitivity.png` is the top of it.
"""

import sys

import fxquant
from fxquant.demo.language_model import calibration_tokens, load_language_model

model = load_language_model().eval()
data = list(calibration_tokens()[::12].split(8))
report = fxquant.sensitivity(model, data, method="gradient", rounding="rtn")
report.to_html(sys.argv[1])
