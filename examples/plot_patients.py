"""
==================
Patients with gaps
==================

Patients come when they come, and no visit measures everything: times differ between
patients, and laboratory values are missing. Here 400 of them are known; a new one has
been seen for three months. How will her values go on, and how sure is that?

The clinic is simulated, so that there are as many patients as we want, none real:
a tumour marker falls under treatment and rises again, at rates that differ between
patients; haemoglobin falls with the first cycles and recovers. About a third of the
values are missing.

Run it with ``python examples/plot_patients.py``, after which the name of another
picture may stand. It takes about 20 seconds on one core.
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from skode import ForecastDisplay, LatentODEForecaster

torch.set_num_threads(1)  # more do not help on a table this small

# %%
# A simulated clinic
# ------------------
# One row is a visit: who, when, and what was measured; NaN where it was not.


def course(rng):
    """Return the true course of a patient's values over days."""
    start, falls = rng.normal(4.0, 0.6), rng.uniform(0.02, 0.06)
    left, rises = rng.normal(0.5, 0.4), rng.uniform(0.0, 0.008)
    usual, harm = rng.normal(13.5, 0.7), rng.uniform(1.0, 5.0)

    def values(day):
        marker = np.logaddexp(start - falls * day, left + rises * day)
        return marker, usual - harm * (np.exp(-day / 150) - np.exp(-day / 30))

    return values


def clinic(n_patients, seed):
    rng = np.random.default_rng(seed)
    visits = []
    for number in range(n_patients):
        values = course(rng)
        n_visits = rng.integers(6, 15)
        day = np.append(0.0, np.sort(rng.uniform(1, 360, n_visits - 1).round()))
        marker, haemoglobin = values(day)
        visit = pd.DataFrame(
            {
                "patient": f"{seed}-{number:03}",
                "day": day,
                "log marker": marker + rng.normal(0.0, 0.15, n_visits),
                "haemoglobin": haemoglobin + rng.normal(0.0, 0.25, n_visits),
            }
        )
        visits.append(visit)
    visits = pd.concat(visits, ignore_index=True)
    for value, share in (("log marker", 0.25), ("haemoglobin", 0.4)):
        visits[value] = visits[value].mask(rng.random(len(visits)) < share)
    return visits


when, values = ["patient", "day"], ["log marker", "haemoglobin"]
past = clinic(400, seed=0)
new = clinic(100, seed=1)
print(past.head(4).to_string(index=False))

# %%
# Fit
# ---
# X says when, and of which patient; y what was measured. ``max_iter`` is low, to be
# quick.

model = LatentODEForecaster(
    time="day", series="patient", max_iter=60, tol=0, random_state=0
)
model.fit(past[when], past[values])

# %%
# New patients
# ------------
# The first three months of patients that were not there in the fit are passed as
# ``history``, in one frame; the rest of their year is forecast. The last column says
# whether the intervals can be trusted: it should be near 90 %.

first, later = new[new["day"] < 90], new[new["day"] >= 90]
forecast = model.predict(later[when], history=first)
intervals = model.predict_interval(later[when], coverage=0.9, history=first)
last = first.groupby("patient")[values].last().reindex(later["patient"])
print(f"\n{'RMSE':>12} {'forecast':>9} {'last value':>11} {'in 90 % interval':>17}")
for value in values:
    errors = [forecast[value] - later[value], last[value].to_numpy() - later[value]]
    ours, theirs = (np.sqrt(np.nanmean(error**2)) for error in errors)
    low, high = intervals[value].to_numpy().T
    measured = later[value].notna()
    inside = ((low < later[value]) & (later[value] < high))[measured].mean()
    print(f"{value:>12} {ours:9.2f} {theirs:11.2f} {inside:17.0%}")

# %%
# How usual is a visit?
# ---------------------
# ``score_samples`` is the log-density of what a visit measured, given the visits before
# it. A visit where two labels were swapped stands out. One that measured nothing says
# nothing: 0.

patient = new[new["patient"] == "1-002"].reset_index(drop=True)
swapped = patient.copy()
visit = swapped[values].dropna().index[-1]
swapped.loc[visit, values] = swapped.loc[visit, values[::-1]].to_numpy()
for name, visits in (("as measured", patient), ("swapped", swapped)):
    log_density = model.score_samples(visits[when], visits[values])
    print(f"{name:>12}: {log_density[visit]:8.1f} nats")

# %%
# The picture
# -----------
# Three new patients, both values; the dashed line is where the history ends. Forecasts
# begin on the first day, so that they also say what may have been between visits.

plt.rcParams.update(
    {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
)
names = new["patient"].unique()[[1, 2, 5]]
fig, axes = plt.subplots(
    2, 3, figsize=(11, 6), layout="constrained", sharex=True, sharey="row"
)
for place, (column, name) in enumerate(zip(axes.T, names, strict=True)):
    days = pd.DataFrame({"patient": name, "day": np.arange(0.0, 361.0, 4)})
    ForecastDisplay.from_estimator(
        model, days, history=first, ax=column, n_paths=2, random_state=0
    )
    hers = later[later["patient"] == name]
    for axis, value in zip(column, values, strict=True):
        axis.plot(hers["day"], hers[value], "o", color="#d1603d", label="later")
        axis.axvline(90, color="#8d99ae", linestyle="--", linewidth=0.8)
        axis.set(xlim=(-5, 365), ylabel=value if place == 0 else "")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=place == 0)
    column[0].set_title(f"patient {name}")
    if place < 2:
        column[0].get_legend().remove()
axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

here = Path(__file__).resolve().parent
picture = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "patients.png"
fig.savefig(picture, dpi=110)
print(f"\n{picture} written")
