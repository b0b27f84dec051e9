"""
==================================
A record with gaps: CO2 in the air
==================================

The carbon dioxide at Mauna Loa, week by week from 1958 on, with weeks and months in
which nothing was measured (Keeling & Whorf 2004; statsmodels has the record). Here it
ends in 1989. How does a forecast of twelve years look, what do its intervals hold, and
what is said of the gaps?

Run it with ``python examples/plot_co2.py``, after which the name of another picture may
stand. It takes a few seconds on one core, and needs statsmodels.
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
past, future = record[:"1989"], record["1990":]
print(f"{len(past)} weeks, {past['co2'].isna().sum()} of them without a value")

# %%
# Fit
# ---
# ``context`` and ``horizon`` say how far back a forecast looks, and how far ahead it is
# meant to reach. Left to itself, the model chooses the context by forecasts within the
# record, as it chooses trend and seasons here.
#
# The record falls into so few stretches of ten and five years that a net would learn by
# heart how each went on. ``path="auto"`` sees that, and learns none: forecasts are
# those of trend and season, by a regression that knows how uncertain it is.
# ``path=True`` would learn a latent path beside them.

model = LatentODEForecaster(context="3650D", horizon="1825D", random_state=0).fit(past)
years = [period / (365.2425 * 86400) for period in model.windows_.periods]
print(f"trend: {model.windows_.trend}, seasons of {np.round(years, 2)} years", end=", ")
print("with a latent path" if model.has_path_ else "without a latent path")

# %%
# Twelve years ahead
# ------------------
# Any times may be asked for, here those of the later record, to compare. The simple
# forecast beside it is the last year again, higher by a year's growth each year.

observed = future["co2"].dropna()
forecast = model.predict(observed.index)["co2"]
interval = model.predict_interval(observed.index, coverage=0.9)["co2"].to_numpy()
inside = (interval[:, 0] < observed) & (observed < interval[:, 1])

weekly = past["co2"].interpolate().to_numpy()
growth = np.mean(weekly[-52:] - weekly[-104:-52])
weeks = np.flatnonzero(future["co2"].notna())
again = weekly[-52:][weeks % 52] + growth * (weeks // 52 + 1)
for name, error in (("model", forecast - observed), ("last year", again - observed)):
    print(f"{name:>12}: RMSE {np.sqrt(np.mean(error**2)):.2f} ppm")
print(f"{inside.mean():.0%} of the later values lie in their 90 % intervals")

# %%
# The gaps
# --------
# Past times may be asked for, too. In the spring of 1964 nothing was measured for
# months: intervals are wider there than between weeks that were.

days = pd.date_range("1963-09-01", "1964-12-31", freq="3D")
_, std = model.predict(days, return_std=True)
for name, day in (("in the gap", "1964-03-26"), ("later", "1964-10-28")):
    nearest = days.get_indexer([pd.Timestamp(day)], method="nearest")[0]
    print(f"{name:>12}: standard deviation {std['co2'].iloc[nearest]:.2f} ppm")

# %%
# The picture
# -----------
# Above: the last ten years that the model knows, and what it says of the next twelve.
# Below: the gap of 1964, within what it knows.

plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
fig, (above, below) = plt.subplots(2, figsize=(9.5, 7), layout="constrained")
ForecastDisplay.from_estimator(model, future, ax=above)
above.set_title("Twelve years ahead")
ForecastDisplay.from_estimator(model, days, ax=below)
below.set_title("A gap")
for axes in (above, below):
    axes.set(xlabel="", ylabel="CO2 in ppm")
    axes.spines[["top", "right"]].set_visible(False)

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "co2.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
