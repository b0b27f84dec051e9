"""Butcher tableaux of explicit Runge-Kutta methods, as data.

A method with S stages has K[0..S-1] that make the step, and K[S] = f(t + h, y1),
which is the first stage of the next step ("first same as last"). Error weights and
dense output may use all S + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method, embedded pair or not."""

    name: str
    order: int
    c: Row
    """(S,) nodes."""
    a: tuple[Row, ...]
    """(S, i) weights of the earlier stages."""
    b: Row
    """(S,) weights of the step."""
    b_err: Row
    """(S + 1,) weights of the local error; empty: fixed steps only."""
    dense: tuple[Row, ...]
    """(S + 1, P) coefficients of theta, theta^2, ...: y(t + theta h)."""

    def __post_init__(self) -> None:
        """Refuse coefficients that cannot be those of a consistent method."""
        for node, row in zip(self.c, self.a, strict=True):
            if abs(sum(row) - node) > 1e-12:
                raise ValueError(f"{self.name}: {row} must sum to its node {node}.")
        if abs(sum(self.b) - 1.0) > 1e-12:
            raise ValueError(f"{self.name}: b must sum to 1.")
        if self.b_err and abs(sum(self.b_err)) > 1e-12:
            raise ValueError(f"{self.name}: b_err must sum to 0.")
        for weight, polynomial in zip((*self.b, 0.0), self.dense, strict=True):
            if abs(sum(polynomial) - weight) > 1e-10:
                raise ValueError(f"{self.name}: dense output must end in the step.")

    @property
    def stages(self) -> int:
        """Evaluations per step."""
        return len(self.b)

    @property
    def error_constant(self) -> float:
        """The e for which the estimated error of one step of y' = y is e h^q.

        For methods without an estimate, 0.
        """
        powers = [1.0] * (self.stages + 1)
        for _ in range(self.order - 1):
            powers = [
                sum(weight * power for weight, power in zip(row, powers, strict=False))
                for row in (*self.a, self.b)
            ]
        return abs(sum(x * y for x, y in zip(self.b_err, powers, strict=False)))

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its local error."""
        return bool(self.b_err)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A tableau as tensors of the state's dtype and device, made once per solve."""

    order: int
    stages: int
    c: Tensor
    """(S + 1, 1) in the dtype of the times."""
    a: tuple[Tensor, ...]
    """S rows of (i,)."""
    a_next: tuple[Tensor, ...]
    """S rows of (S - i,): what stage i feeds, later stages first and then y1."""
    a_square: Tensor
    """(S, S), zero on and above the diagonal."""
    b: Tensor
    """(S,)."""
    b_err: Tensor
    """(S + 1,), empty for fixed-step methods."""
    dense: Tensor
    """(P, S + 1)."""
    error_constant: float


@lru_cache(maxsize=64)
def coefficients(
    tableau: Tableau, dtype: torch.dtype, time_dtype: torch.dtype, device: torch.device
) -> Coefficients:
    """Cast a tableau to tensors."""

    def cast(values: Sequence[object]) -> Tensor:
        # Kept for later solves, which may need autograd if this one does not.
        with torch.inference_mode(False):
            return torch.tensor(values, dtype=torch.float64).to(device, dtype)

    n = tableau.stages
    square = [[*row, *[0.0] * (n - len(row))] for row in tableau.a]
    fed = [[*(square[j][i] for j in range(i + 1, n)), tableau.b[i]] for i in range(n)]
    with torch.inference_mode(False):
        nodes = cast([*tableau.c, 1.0]).to(time_dtype)[:, None]
        dense = cast(tableau.dense).T.contiguous()
    return Coefficients(
        order=tableau.order,
        stages=n,
        c=nodes,
        a=tuple(cast(row) for row in tableau.a),
        a_next=tuple(cast(row) for row in fed),
        a_square=cast(square),
        b=cast(tableau.b),
        b_err=cast(tableau.b_err),
        dense=dense,
        error_constant=tableau.error_constant,
    )


def _hermite(b: Row) -> tuple[Row, ...]:
    """Cubic Hermite interpolation of y0, f0, y1, f1: error O(h^4)."""
    step = [(0.0, 3.0 * weight, -2.0 * weight) for weight in (*b, 0.0)]
    first, last = step[0], step[-1]
    step[0] = (first[0] + 1.0, first[1] - 2.0, first[2] + 1.0)
    step[-1] = (last[0], last[1] - 1.0, last[2] + 1.0)
    return tuple(step)


def _product(*factors: Row) -> Row:
    """Coefficients of a product of polynomials, lowest power first."""
    result: list[float] = [1.0]
    for factor in factors:
        longer = [0.0] * (len(result) + len(factor) - 1)
        for i, x in enumerate(result):
            for j, y in enumerate(factor):
                longer[i + j] += x * y
        result = longer
    return tuple(result)


def _fixed(name: str, order: int, a: tuple[Row, ...], b: Row) -> Tableau:
    c = tuple(sum(row) for row in a)
    return Tableau(name, order, c, a, b, (), _hermite(b))


EULER = _fixed("euler", 1, ((),), (1.0,))
MIDPOINT = _fixed("midpoint", 2, ((), (0.5,)), (0.0, 1.0))
HEUN2 = _fixed("heun2", 2, ((), (1.0,)), (0.5, 0.5))
# Kutta's 3/8 rule, which is what torchdiffeq calls "rk4": the error constant is
# smaller than the classical method's at the same cost.
RK4 = _fixed(
    "rk4",
    4,
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

ADAPTIVE_HEUN = Tableau(
    "adaptive_heun",
    2,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(0.5, 0.5),
    b_err=(-0.5, 0.5, 0.0),
    dense=_hermite((0.5, 0.5)),
)

# Bogacki & Shampine (1989), doi:10.1016/0893-9659(89)90079-7.
BOSH3 = Tableau(
    "bosh3",
    3,
    c=(0.0, 1 / 2, 3 / 4),
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
    b_err=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    dense=_hermite((2 / 9, 1 / 3, 4 / 9)),
)


def _dopri5_dense(b: Row) -> tuple[Row, ...]:
    """Continuous extension of order 4, Hairer, Norsett & Wanner (1993), II.6."""
    d = (
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    )
    # y0 + theta (dy + (1 - theta) (h k0 - dy + theta (2 dy - h k0 - h k6
    #    + (1 - theta) h sum_i d_i k_i)))  with  dy = h sum_i b_i k_i.
    rows = []
    for i, (weight, extra) in enumerate(zip((*b, 0.0), d, strict=True)):
        first, last = float(i == 0), float(i == 6)
        slope = first - weight
        bend = 2.0 * weight - first - last
        rows.append(
            (
                weight + slope,
                -slope + bend + extra,
                -bend - 2.0 * extra,
                extra,
            )
        )
    return tuple(rows)


# Dormand & Prince (1980), doi:10.1016/0771-050X(80)90013-3.
_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DOPRI5 = Tableau(
    "dopri5",
    5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=_DOPRI5_B,
    b_err=(
        35 / 384 - 5179 / 57600,
        0.0,
        500 / 1113 - 7571 / 16695,
        125 / 192 - 393 / 640,
        -2187 / 6784 + 92097 / 339200,
        11 / 84 - 187 / 2100,
        -1 / 40,
    ),
    dense=_dopri5_dense(_DOPRI5_B),
)

# Tsitouras (2011), doi:10.1016/j.camwa.2011.06.002, with his free interpolant of
# order 4 (factored as there).
_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
TSIT5 = Tableau(
    "tsit5",
    5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (
            5.325864828439257,
            -11.748883564062828,
            7.4955393428898365,
            -0.09249506636175525,
        ),
        (
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ),
    ),
    b=_TSIT5_B,
    b_err=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    dense=(
        _product(
            (-1.0530884977290216,),
            (-1.3299890189751412, 1.0),
            (0.7139816917074209, -1.4364028541716351, 1.0),
        ),
        _product((0.1017,), (0.0, 1.2949852507374631, -2.1966568338249754, 1.0)),
        _product(
            (2.490627285651252793,),
            (0.0, 1.57803468208092486, -2.38535645472061657, 1.0),
        ),
        _product(
            (-16.54810288924490272,),
            (0.0, 1.0),
            (-1.21712927295533244, 1.0),
            (-0.61620406037800089, 1.0),
        ),
        _product(
            (47.37952196281928122,),
            (0.0, 1.0),
            (-1.203071208372362603, 1.0),
            (-0.658047292653547382, 1.0),
        ),
        _product((-34.87065786149660974,), (0.0, 1.0), (-1.2, 1.0), (-2 / 3, 1.0)),
        _product((2.5,), (0.0, 1.0), (-1.0, 1.0), (-0.6, 1.0)),
    ),
)

# Prince & Dormand (1981), RK8(7)13M, doi:10.1016/0771-050X(81)90010-3, with the
# continuous extension that torchdiffeq evaluates at mid-step: order 5 inside a step,
# order 8 at its ends.
_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_DOPRI8_B7 = (
    13451932 / 455176623,
    0.0,
    0.0,
    0.0,
    0.0,
    -808719846 / 976000145,
    1757004468 / 5645159321,
    656045339 / 265891186,
    -3867574721 / 1518517206,
    465885868 / 322736535,
    53011238 / 667516719,
    2 / 45,
    0.0,
)
DOPRI8 = Tableau(
    "dopri8",
    8,
    c=(
        0.0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906,
            0.0,
            0.0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
    ),
    b=_DOPRI8_B,
    b_err=(*(high - low for high, low in zip(_DOPRI8_B, _DOPRI8_B7, strict=True)), 0.0),
    dense=(
        (
            1.0,
            -6.6910181737837595,
            19.999006933368396,
            -30.061056828966645,
            22.139650499809406,
            -6.34483493928604,
        ),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (
            0.0,
            -7.6142658045872675,
            52.227353279294555,
            -121.49996277313346,
            116.44221495503422,
            -39.61079198522025,
        ),
        (
            0.0,
            10.728139263042886,
            -46.89191641810936,
            83.17210046398478,
            -67.14513188259572,
            20.376121380879145,
        ),
        (
            0.0,
            0.5526637063753649,
            -0.18908932250105956,
            9.572450755599366,
            -16.56722435274965,
            7.334709882679536,
        ),
        (
            0.0,
            4.218656262566515,
            -35.70759759462221,
            87.84060576772056,
            -89.9916014847245,
            32.88017743524592,
        ),
        (
            0.0,
            -0.6627209125361597,
            6.273644808324035,
            -17.415210777076297,
            22.623748964853284,
            -10.158899052642676,
        ),
        (
            0.0,
            -1.2636789001135462,
            10.316088127245076,
            -28.590328951479098,
            32.23623401673554,
            -12.540126809878256,
        ),
        (
            0.0,
            5.410603789859042,
            -34.76507698666118,
            81.66309505843414,
            -82.10203154883598,
            29.555300148451604,
        ),
        (
            0.0,
            -7.032137906794574,
            47.745797107822554,
            -114.93752913770093,
            116.26621857911195,
            -41.79234864243906,
        ),
        (
            0.0,
            2.3537586759714983,
            -19.008209934160803,
            50.255836422617605,
            -53.90207774663854,
            20.300692582210083,
        ),
    ),
)

TABLEAUX = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN2,
        RK4,
        ADAPTIVE_HEUN,
        BOSH3,
        DOPRI5,
        TSIT5,
        DOPRI8,
    )
}
