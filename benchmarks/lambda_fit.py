"""Time, steps and final error of `fit_lambdas` and of three other solvers of the same dual.

    python benchmarks/lambda_fit.py             # writes results/lambda_fit.csv
    python benchmarks/lambda_fit.py --quick     # writes nothing

Solvers, all on the same samples and from lambda = 0:
- dmgen: `fit_lambdas`, with all it reports (errors, ESS, rank, checks of the input);
- trust-exact: scipy's Newton trust region, exact gradient and Hessian, standardised features;
- L-BFGS-B: scipy, exact gradient, standardised features;
- gradient: `lambda += 0.5 (target - moments)`, at most 1000 steps, until the largest error is 1e-8,
  on the features as they are: the scheme usual for this problem, written for this comparison.
The other solvers return lambda only. The error is the largest |moment - target|, in standard
deviations of the feature under the target, computed the same way for all.

Binary features have base rates from 0.5 down to 0.01 and targets twice the rate (at most 0.6);
rare ones have rates from 0.05 down to 0.001 and targets 0.4; real ones are normal with scales from
0.1 to 40 and means up to 100, targets half a standard deviation off (less for K > 9: the corner of
a cube is outside the hull of few points). Another solver is not run on more than `--rival-limit`
numbers (N K), the gradient solver not on more than an eighth of it: "-" in the table. "diverged" is
an error above one standard deviation.

The eight rare features of the largest case have targets exactly on the edge of the hull: no finite
lambda exists, and the 19 texts on that edge would carry all weight. `fit_lambdas` proves it; the
others return a lambda of 145 and report convergence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import record
import tables
from numpy.typing import NDArray
from scipy.optimize import minimize

from dmgen.target.moments import MomentsUnreachable, fit_lambdas

KINDS = ("binary", "rare", "real")
Array = NDArray[np.float64]
Solver = Callable[[Array, Array], tuple[Array, int]]


def problem(kind: str, n: int, k: int, seed: int) -> tuple[Array, Array]:
    """Return features (N, K) and targets (K,) inside their hull."""
    g = np.random.default_rng([seed, n, k, KINDS.index(kind)])
    if kind == "real":
        phi = g.normal(size=(n, k)) * np.geomspace(40, 0.1, k) + np.linspace(100, 0, k)
        return phi, phi.mean(0) + min(0.5, 1.5 / np.sqrt(k)) * phi.std(0)
    rates = np.geomspace(0.5, 0.01, k) if kind == "binary" else np.geomspace(0.001, 0.05, k)
    phi = np.empty((n, k))
    for j, rate in enumerate(rates):
        phi[:, j] = g.random(n) < rate
    return phi, np.minimum(2 * phi.mean(0), 0.6) if kind == "binary" else np.full(k, 0.4)


def tilt(phi: Array, lambdas: Array) -> tuple[float, Array]:
    logits = phi @ lambdas
    top = logits.max()
    p = np.exp(logits - top)
    total = p.sum()
    return float(top + np.log(total / len(p))), p / total


def solve_dmgen(phi: Array, targets: Array) -> tuple[Array, int]:
    fit = fit_lambdas(phi, targets)
    return fit.lambdas, fit.n_steps


def solve_scipy(method: str, options: dict[str, Any]) -> Solver:
    def solve(phi: Array, targets: Array) -> tuple[Array, int]:
        mean, scale = phi.mean(0), phi.std(0)
        x, t = (phi - mean) / scale, (targets - mean) / scale

        def value(lambdas: Array) -> tuple[float, Array]:
            log_z, p = tilt(x, lambdas)
            return log_z - float(lambdas @ t), p @ x - t

        def hessian(lambdas: Array) -> Array:
            _, p = tilt(x, lambdas)
            centred = x - p @ x
            return (centred * p[:, None]).T @ centred

        exact = {"hess": hessian} if method == "trust-exact" else {}
        solution = minimize(
            value, np.zeros(len(t)), jac=True, method=method, options=options, **exact
        )
        return solution.x / scale, int(solution.nit)

    return solve


def solve_gradient(phi: Array, targets: Array) -> tuple[Array, int]:
    lambdas = np.zeros(len(targets))
    for step in range(1000):
        # A step too long for the scale of a feature ends in overflow, and stays there.
        with np.errstate(over="ignore", invalid="ignore"):
            error = targets - tilt(phi, lambdas)[1] @ phi
            if not np.abs(error).max() > 1e-8:
                return lambdas, step
            lambdas = lambdas + 0.5 * error
    return lambdas, 1000


SOLVERS: dict[str, Solver] = {
    "dmgen": solve_dmgen,
    "trust-exact": solve_scipy("trust-exact", {"gtol": 1e-8, "maxiter": 1000}),
    "L-BFGS-B": solve_scipy("L-BFGS-B", {"gtol": 1e-8, "ftol": 0.0, "maxiter": 1000}),
    "gradient": solve_gradient,
}


def error_of(phi: Array, targets: Array, lambdas: Array) -> float:
    """Return the largest distance from a target, in standard deviations under p."""
    with np.errstate(over="ignore", invalid="ignore"):
        p = tilt(phi, lambdas)[1]
        moments = p @ phi
        deviation = np.sqrt(p @ (phi - moments) ** 2)
        return float(np.max(np.abs(moments - targets) / np.maximum(deviation, 1e-12)))


def measure(phi: Array, targets: Array, solver: Solver, repeats: int) -> dict[str, Any]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        try:
            lambdas, steps = solver(phi, targets)
        except MomentsUnreachable as refusal:
            return {"refused": str(refusal)[:200], "seconds": time.perf_counter() - start}
        seconds.append(time.perf_counter() - start)
        if seconds[0] > 1:
            break
    return {"seconds": min(seconds), "steps": steps, "error": error_of(phi, targets, lambdas)}


def cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    if "refused" in result:
        return f"proven out of reach, {duration(result['seconds'])}"
    error = f"{result['error']:.0e}" if result["error"] < 1 else "diverged"
    return f"{duration(result['seconds'])}, {result['steps']:.0f}, {error}"


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def table(rows: list[dict[str, Any]]) -> str:
    """Return a markdown table: time, steps, error a cell."""
    lines = [
        "| features | N | K | " + " | ".join(SOLVERS) + " |",
        "|---" * (3 + len(SOLVERS)) + "|",
    ]
    for row in rows:
        cells = [cell(row["solvers"].get(name)) for name in SOLVERS]
        lines.append(f"| {row['kind']} | {row['n']:,} | {row['k']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the table, a row a problem and solver."""
    flat = [
        {"kind": row["kind"], "n": row["n"], "k": row["k"], "solver": name} | result
        for row in rows
        for name, result in row["solvers"].items()
    ]
    tables.write("lambda_fit", pd.DataFrame(flat), facts)


def load() -> list[dict[str, Any]]:
    """Return the rows of the table, a dictionary a problem."""
    rows = []
    for (kind, n, k), part in tables.groups(tables.read("lambda_fit"), ["kind", "n", "k"]):
        solvers = {
            row.pop("solver"): {key: x for key, x in row.items() if not pd.isna(x)}
            for row in part.drop(columns=["kind", "n", "k"]).to_dict("records")
        }
        rows.append({"kind": kind, "n": n, "k": k, "solvers": solvers})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="N up to 20,000, one repeat, no file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="the fastest one counts")
    parser.add_argument("--rival-limit", type=float, default=8e6, help="largest N K for the others")
    args = parser.parse_args()

    few = [(20_000, 1), (20_000, 4)]
    some = [(1000, 1), (1000, 8), (20_000, 4), (20_000, 64)]
    if not args.quick:
        few += [(100_000, 4), (1_000_000, 4), (1_000_000, 8)]
        some += [(1000, 32), (100_000, 8), (1_000_000, 1), (1_000_000, 8), (1_000_000, 64)]
    rows = []
    for kind in KINDS:
        for n, k in sorted(few if kind == "rare" else some):
            phi, targets = problem(kind, n, k, args.seed)
            limits = {"dmgen": np.inf, "gradient": args.rival_limit / 8}
            solvers = {
                name: measure(phi, targets, solver, 1 if args.quick else args.repeats)
                for name, solver in SOLVERS.items()
                if n * k <= limits.get(name, args.rival_limit)
            }
            rows.append({"kind": kind, "n": n, "k": k, "solvers": solvers})

    print("Time, steps, largest error in standard deviations.\n")
    print(table(rows))
    if not args.quick:
        write(rows, record.facts() | {"seed": args.seed})


if __name__ == "__main__":
    main()
