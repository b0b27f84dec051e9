"""Neural ordinary differential equations for scikit-learn."""

from skode.density import CNFDensityEstimator
from skode.display import DensityDisplay, FlowDisplay, ForecastDisplay
from skode.exceptions import DivergenceError, SolverError, SolverWarning
from skode.forecast import LatentODEForecaster
from skode.odeint import odeint, odeint_adjoint
from skode.supervised import ODEClassifier, ODERegressor

__all__ = [
    "CNFDensityEstimator",
    "DensityDisplay",
    "DivergenceError",
    "FlowDisplay",
    "ForecastDisplay",
    "LatentODEForecaster",
    "ODEClassifier",
    "ODERegressor",
    "SolverError",
    "SolverWarning",
    "odeint",
    "odeint_adjoint",
]
