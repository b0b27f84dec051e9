"""
======================================
A record with gaps: CO2 in the air
======================================

The carbon dioxide at Mauna Loa, week by week from 1958 on, with weeks and months in which
nothing was measured (Keeling & Whorf 2004; statsmodels has the record). One long series,
with a trend that bends and a season of a year: how does a forecast of six years look, what
do its intervals hold, and what does the model make of the gaps?

Run it with ``python examples/plot_co2.py``, after which the name of another picture may
stand. It takes about half a minute on one core, and needs statsmodels.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from statsmodels.datasets import co2

from skode import ForecastDisplay, LatentODEForecaster

torch.set_num_threads(1)  # more do not help on a record this small

# %%
# The record
# ----------
# A frame with times in its index is all that the model wants. NaN means not observed;
# nothing is filled in, and rows could be missing as well.

record = co2.load_pandas().data
past, future = record[:"1995"], record["1996":]
print(f"{len(past)} weeks, {past['co2'].isna().sum()} of them without a value")

# %%
# Fit
# ---
# ``context`` and ``horizon`` say what a forecast looks at, and how far it goes. Left to
# itself, the model chooses the context by forecasts within the record, among an eighth,
# a quarter and half of it. Trend and season are chosen in this way here. ``max_iter`` is
# low, to be quick.

model = LatentODEForecaster(
    context="3650D", horizon="1825D", max_iter=25, tol=0, random_state=0
)
model.fit(past)
years = [period / (365.2425 * 86400) for period in model.windows_.periods]
print(f"trend: {model.windows_.trend}, seasons of {np.round(years, 2)} years")

# %%
# Six years ahead
# ---------------
# Any times may be asked for, here those of the later record, to compare. The last year
# again is a forecast to be taken seriously: it has the season.

known = future["co2"].notna()
observed = future.loc[known, "co2"]
forecast = model.predict(observed.index)["co2"]
interval = model.predict_interval(observed.index, coverage=0.9)["co2"].to_numpy()
inside = (interval[:, 0] < observed) & (observed < interval[:, 1])
filled = past["co2"].interpolate()
last_year = filled.reindex(
    filled.index[-52:][np.arange(len(future)) % 52]
).to_numpy()[known]
for name, error in (("model", forecast - observed), ("last year", last_year - observed)):
    print(f"{name:>12}: RMSE {np.sqrt(np.mean(error**2)):.2f} ppm")
print(f"{inside.mean():.0%} of the later values lie in their 90 % intervals")

# %%
# The gaps
# --------
# Past times may be asked for, too. In 1964 three months are missing: there the interval
# is wider than where weeks before and after were measured.

days = pd.date_range("1963-09-01", "1964-12-31", freq="3D")

# %%
# The picture
# -----------
# Above: the last ten years that the model knows, and what it says of the next six. Below:
# the gaps of 1964.

plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (above, below) = plt.subplots(2, figsize=(9.5, 7), layout="constrained")
ForecastDisplay.from_estimator(model, future, ax=above)
above.set_title("Six years ahead")
ForecastDisplay.from_estimator(model, days, ax=below)
below.set(title="A gap", xlim=(days[0], days[-1]))
for axes in (above, below):
    axes.set(xlabel="", ylabel="CO2 in ppm")
    axes.spines[["top", "right"]].set_visible(False)

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "co2.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
