"""Bounded Ratio Reinforcement Learning (BRRL), exact, on random finite MDPs.

The paper: "Bounded Ratio Reinforcement Learning" (Ao, Chen, Lee, Wahd, Czarnobai, Fuernstahl, Schoelkopf, Krause).
On a finite MDP the returns, advantages and visitations of a policy are solutions of linear systems, so every theorem
of the paper can be computed instead of believed. This script does that on `--num-mdps` random MDPs, prints a table of
claim, measured, holds or not, and draws the figures that `docs/brrl_tabular.md` walks through:

    python brrl_tabular.py

"As printed" marks a statement copied literally from the text that turns out wrong; "corrected" is ours, next to it.
The bounds of conservative policy iteration (CPI) and the two toy pathologies are those of "Reinforcement Learning for
LLM Alignment (Draft)", called "the alignment text"; the bound of TRPO is Theorem 1 of Schulman et al. (2015).

Shapes: M MDPs, S states, A actions. All arrays are float64. The visitation is unnormalised, as in the paper.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.optimize import elementwise, linprog
from scipy.special import expit, softmax, xlogy

TOLERANCE = 1e-9  # relative; a claim violated by more than this fails
TINY = np.finfo(float).tiny


@dataclass
class Args:
    seed: int = 1
    """seed of the random MDPs and policies"""
    num_mdps: int = 1000
    """number of random MDPs that every claim is checked on"""
    num_states: int = 8
    """states of each MDP, at least 1"""
    num_actions: int = 4
    """actions of each MDP, at least 2"""
    gamma: float = 0.9
    """discount factor, in [0, 1)"""
    epsilon: float = 0.2
    """symmetric bound on the ratio, in (0, 1): 1 - epsilon <= pi / pi_0 <= 1 + epsilon"""
    ratio_low: float = 0.5
    """lower asymmetric bound c_l on the ratio, in [0, 1)"""
    ratio_high: float = 2.0
    """upper asymmetric bound c_h on the ratio, above 1"""
    temperature: float = 0.01
    """the paper's lambda, in units of reward (rewards lie in [0, 1]), above 0"""
    output_dir: Path = Path("runs/brrl_tabular")
    """folder of the figures and of table.md"""


def cases(args):
    """[(its guarantee, c_l, c_h)]: the symmetric bounds of Theorem 4.1, then the asymmetric ones of Corollary 4.7."""
    return [("Thm 4.2", 1 - args.epsilon, 1 + args.epsilon), ("Cor A.3", args.ratio_low, args.ratio_high)]


class Mdp(NamedTuple):
    """M finite MDPs: transition [M, S, A, S], expected reward [M, S, A], initial distribution [M, S], discount."""

    transition: np.ndarray
    reward: np.ndarray
    initial: np.ndarray
    gamma: float


class Evaluation(NamedTuple):
    """Exact quantities of a policy: V [M, S], Q [M, S, A], A [M, S, A], visitation d [M, S], return eta [M]."""

    value: np.ndarray
    q_value: np.ndarray
    advantage: np.ndarray
    visitation: np.ndarray
    eta: np.ndarray


class Row(NamedTuple):
    """One line of the table."""

    source: str
    claim: str
    measured: str
    verdict: str


def check_bounds(ratio_low, ratio_high, temperature):
    """Raises ValueError unless 0 <= ratio_low < 1 < ratio_high < inf and 0 < temperature < inf."""
    if not 0 <= ratio_low < 1 < ratio_high < np.inf:
        raise ValueError(f"need 0 <= ratio_low < 1 < ratio_high, got {ratio_low} and {ratio_high}: try 0.5 and 2")
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature (the paper's lambda) must be above 0, got {temperature}: try 0.01")


def validate(args):
    """Raises ValueError with one line for the first bad field of `args`."""
    check_discount(args.gamma)
    if not 0 < args.epsilon < 1:
        raise ValueError(f"epsilon must lie in (0, 1), got {args.epsilon}: try 0.2")
    check_bounds(args.ratio_low, args.ratio_high, args.temperature)
    if args.num_mdps < 1 or args.num_states < 1 or args.num_actions < 2:
        got = f"{args.num_mdps}, {args.num_states}, {args.num_actions}"
        raise ValueError(f"empty MDP: num_mdps, num_states, num_actions must be at least 1, 1, 2, got {got}")
    if args.seed < 0:
        raise ValueError(f"seed must be 0 or more, got {args.seed}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"output_dir {args.output_dir} is a file: name a folder")


def check_discount(gamma):
    """Raises ValueError unless 0 <= gamma < 1."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {gamma}: try 0.9")


# 1. Finite MDPs


def make_mdp(transition, reward, initial, gamma):
    """Checked `Mdp`; a leading axis M may be any batch shape. Raises ValueError if empty, malformed or gamma is bad."""
    check_discount(gamma)
    if 0 in reward.shape or reward.ndim < 2:
        raise ValueError(f"empty MDP: reward has shape {reward.shape}, it needs at least one state and one action")
    if transition.shape != (*reward.shape, reward.shape[-2]) or initial.shape != reward.shape[:-1]:
        shapes = f"{transition.shape}, {reward.shape}, {initial.shape}"
        raise ValueError(f"transition, reward, initial must be [.., S, A, S], [.., S, A], [.., S], got {shapes}")
    if not all(np.all(p >= 0) and np.allclose(p.sum(-1), 1) for p in (transition, initial)):
        raise ValueError("every row of transition and initial must be a probability distribution")
    return Mdp(transition, reward, initial, gamma)


def first(mdp, count):
    """The first `count` MDPs."""
    return Mdp(mdp.transition[:count], mdp.reward[:count], mdp.initial[:count], mdp.gamma)


def random_mdps(rng, num_mdps, num_states, num_actions, gamma):
    """M seeded MDPs: Dirichlet(0.3) transitions, rewards uniform on [0, 1], a random start. Nothing is lost by that
    range: adding to or scaling all rewards only shifts and scales the returns (scale lambda with them)."""
    transition = rng.dirichlet(np.full(num_states, 0.3), (num_mdps, num_states, num_actions))
    reward = rng.random((num_mdps, num_states, num_actions))
    return make_mdp(transition, reward, rng.dirichlet(np.ones(num_states), num_mdps), gamma)


def expect(probabilities, x):
    """sum_a p(a) x(a): [..., A] -> [...]."""
    return (probabilities * x).sum(-1)


def evaluate(mdp, policy):
    """Exact `Evaluation` of `policy` [M, S, A] by linear solves (the paper, Eq. 20-21)."""
    kernel = np.einsum("...sa,...sat->...st", policy, mdp.transition)
    bellman = np.eye(kernel.shape[-1]) - mdp.gamma * kernel
    value = np.linalg.solve(bellman, expect(policy, mdp.reward)[..., None])[..., 0]
    visitation = np.linalg.solve(np.swapaxes(bellman, -1, -2), mdp.initial[..., None])[..., 0]
    q_value = mdp.reward + mdp.gamma * np.einsum("...sat,...t->...sa", mdp.transition, value)
    return Evaluation(value, q_value, q_value - value[..., None], visitation, expect(mdp.initial, value))


def optimal_return(mdp):
    """Return [M] of the best policy by value iteration, run until nothing moves beyond rounding."""
    value = np.zeros(mdp.initial.shape)
    while True:
        new = (mdp.reward + mdp.gamma * np.einsum("...sat,...t->...sa", mdp.transition, value)).max(-1)
        if np.abs(new - value).max() <= 4 * np.finfo(float).eps * np.abs(new).max():  # all that float64 resolves
            return expect(mdp.initial, new)
        value = new


# 2. The bounded ratio optimum


def target_ratio(median_advantage, ratio_low, ratio_high, temperature):
    """pi*/pi_0, elementwise: Corollary 4.7, which is Theorem 4.1 for bounds 1 -+ epsilon."""
    log_c = np.log((ratio_high - 1) / (1 - ratio_low))
    return ratio_low + (ratio_high - ratio_low) * expit(median_advantage / temperature - log_c)


def median_loss(returns, median_values, ratio_low, ratio_high, temperature):
    """lambda g'(x / lambda) of Corollary 4.7 and Eq. 15, elementwise; its mean is least at the soft quantile."""
    x = returns - median_values
    log_c = np.log((ratio_high - 1) / (1 - ratio_low))
    k = (ratio_high - 1) / (ratio_high - ratio_low)
    return k * x + temperature * np.logaddexp(0, log_c - x / temperature)


def regularizer(ratio, ratio_low, ratio_high):
    """H' of Problem (18), which is H of Problem (9) for bounds 1 -+ epsilon; elementwise, 0 log 0 = 0."""
    log_c = np.log((ratio_high - 1) / (1 - ratio_low))
    return xlogy(ratio - ratio_low, ratio - ratio_low) + xlogy(ratio_high - ratio, ratio_high - ratio) + log_c * ratio


def soft_median_advantage(q_value, old_policy, ratio_low, ratio_high, temperature):
    """Q - mu [..., A], mu the soft (c_h-1)/(c_h-c_l)-quantile: the root of E_{pi_0}[pi*/pi_0] = 1 in mu, bracketed.

    The excess E[pi*/pi_0] - 1 falls with mu, is positive below min Q and negative above max Q (Appendix A.1, A.6).
    Raises ValueError for bad bounds, and when the temperature is too small beside Q for float64 to normalise pi*.
    """
    check_bounds(ratio_low, ratio_high, temperature)
    q = (q_value - q_value.mean(-1, keepdims=True)).reshape(-1, q_value.shape[-1])  # centred: mu keeps its digits
    p = np.broadcast_to(old_policy, q_value.shape).reshape(q.shape)

    def excess(mu, row):
        return expect(p[row], target_ratio(q[row] - mu[..., None], ratio_low, ratio_high, temperature)) - 1

    bracket = q.min(-1) - temperature, q.max(-1) + temperature
    result = elementwise.find_root(excess, bracket, args=(np.arange(len(q)),))
    if not np.all(np.abs(result.f_x) < 1e-10):
        raise ValueError(
            f"temperature {temperature} is too small: pi* sums to 1 only within {np.abs(result.f_x).max():.0e}"
        )
    return (q - result.x[:, None]).reshape(q_value.shape)


def optimal_policy(q_value, old_policy, ratio_low, ratio_high, temperature):
    """(pi* [..., A], soft-median advantage [..., A]) of Problem (18): Theorem 4.1 and Corollary 4.7."""
    median_advantage = soft_median_advantage(q_value, old_policy, ratio_low, ratio_high, temperature)
    return old_policy * target_ratio(median_advantage, ratio_low, ratio_high, temperature), median_advantage


def limit_policy(q_value, old_policy, ratio_low, ratio_high):
    """Exact optimum of Problem (4), lambda = 0 [..., A]: every action gets c_l pi_0, then the best ones are raised to
    c_h pi_0 until the probability is spent. The action at the quantile gets what remains; (5) has no such action."""
    order = np.argsort(-q_value, -1)
    p = np.take_along_axis(old_policy, order, -1)
    room = (ratio_high - ratio_low) * p
    raised = np.clip((1 - ratio_low) - (np.cumsum(room, -1) - room), 0, room)
    policy = np.empty_like(p)
    np.put_along_axis(policy, order, ratio_low * p + raised, -1)
    return policy


def state_gain(median_advantage, old_policy, ratio_low, ratio_high, temperature, tanh_advantage=None):
    """(c_h-1) B'(s) of Corollary A.3 [..., S], literally; for bounds 1 -+ epsilon it is epsilon B_1(s) of Theorem 4.2.

    The printed corollary drops a prime: `tanh_advantage` puts another advantage into its tanh(A~/2 lambda) A~.
    """
    tilde = median_advantage if tanh_advantage is None else tanh_advantage
    e = np.exp(np.clip(-median_advantage / temperature, None, 700))  # beyond 700 the factor has reached its limit 1/c
    factor = (1 + e) / (1 + (ratio_high - 1) / (1 - ratio_low) * e)
    return (ratio_high - 1) * expect(old_policy, factor * np.tanh(tilde / 2 / temperature) * tilde)


def gain_from_old_data(mdp, old_policy, gain_per_state, ratio_low):
    """Ours: a lower bound [M] on eta(pi*) - eta(pi_0) that needs no visitation of pi*.

    P_{pi*} >= c_l P_{pi_0} elementwise, hence d_{pi*} >= the visitation of pi_0 at discount c_l gamma.
    """
    return expect(evaluate(mdp._replace(gamma=ratio_low * mdp.gamma), old_policy).visitation, gain_per_state)


# 3. The steps BRRL is compared with


def trpo_bound(mdp, old_policy, old, policy):
    """Schulman et al. (2015), Theorem 1: (surrogate gain [M], penalty [M]); their difference bounds the true gain."""
    surrogate = expect(old.visitation, expect(policy, old.advantage))
    total_variation = np.abs(policy - old_policy).sum(-1).max(-1) / 2
    largest_advantage = np.abs(old.advantage).max((-1, -2))
    return surrogate, 4 * mdp.gamma * largest_advantage / (1 - mdp.gamma) ** 2 * total_variation**2


def trpo_step(mdp, old_policy, old, max_kl=None):
    """Natural-gradient step pi_0 exp(step A) / Z of the softmax policy [M, S, A]: the one of 61 step sizes with the
    largest TRPO bound, or (`max_kl`, nats) the largest of mean KL <= max_kl, the alignment text's Eq. 67."""
    with np.errstate(divide="ignore"):
        log_policy = np.log(old_policy)
    direction = old.advantage / np.maximum(np.abs(old.advantage).max((-1, -2), keepdims=True), TINY)
    if max_kl is None:
        best, best_bound = old_policy, np.zeros(len(old_policy))
        for step in np.geomspace(1e-4, 1e2, 61):
            policy = softmax(log_policy + step * direction, -1)
            surrogate, penalty = trpo_bound(mdp, old_policy, old, policy)
            best = np.where((surrogate - penalty > best_bound)[:, None, None], policy, best)
            best_bound = np.maximum(best_bound, surrogate - penalty)
        return best
    low, high = np.zeros((len(old_policy), 1, 1)), np.full((len(old_policy), 1, 1), 1e2)
    for _ in range(50):  # bisection: the KL divergence grows with the step
        step = (low + high) / 2
        policy = softmax(log_policy + step * direction, -1)
        kl = (xlogy(old_policy, old_policy) - xlogy(old_policy, policy)).sum(-1)
        small = ((1 - mdp.gamma) * expect(old.visitation, kl) <= max_kl)[:, None, None]
        low, high = np.where(small, step, low), np.where(small, high, step)
    return softmax(log_policy + low * direction, -1)


def cpi_bound(mdp, old, greedy, alpha):
    """(surrogate gain alpha g [M], penalty [M]) of the mixture with `greedy`: the alignment text, Eq. 58-60."""
    greedy_advantage = expect(greedy, old.advantage)
    penalty = 2 * mdp.gamma / (1 - mdp.gamma) ** 2 * np.abs(greedy_advantage).max(-1) * alpha**2
    return alpha * expect(old.visitation, greedy_advantage), penalty


def cpi_step(mdp, old_policy, old):
    """(mixture [M, S, A], greedy policy, alpha* [M]) of conservative policy iteration: Eq. 55 and 61."""
    greedy = np.eye(old.advantage.shape[-1])[old.advantage.argmax(-1)]
    gain, penalty = cpi_bound(mdp, old, greedy, 1.0)
    alpha = np.where(gain < 2 * penalty, gain / np.maximum(2 * penalty, TINY), 1.0)
    mix = alpha[:, None, None]
    return (1 - mix) * old_policy + mix * greedy, greedy, alpha


# 4. Parameterised policies


def bpo_gradient_steps(mdp, features, theta, epsilon, temperature, num_steps):
    """[pi_0, pi_1, ..]: softmax policies [M, S, A] of theta [M, F] along normalised subgradient steps on Eq. 16.

    features [M, S, A, F]; alpha_1 = 0; the expectation is exact, not sampled.
    """
    old_policy = policy = softmax(np.einsum("msaf,mf->msa", features, theta), -1)
    old, path = evaluate(mdp, old_policy), [old_policy]
    best, _ = optimal_policy(old.q_value, old_policy, 1 - epsilon, 1 + epsilon, temperature)
    for step in range(num_steps):
        slope = old.visitation[..., None] * np.sign(policy - best) * np.abs(old.advantage)  # d loss / d pi
        centred = features - np.einsum("msa,msaf->msf", policy, features)[..., None, :]  # grad log pi
        gradient = np.einsum("msa,msa,msaf->mf", policy, slope, centred)
        norm = np.maximum(np.linalg.norm(gradient, axis=-1, keepdims=True), TINY)
        theta = theta - 0.1 / (1 + step) * gradient / norm
        policy = softmax(np.einsum("msaf,mf->msa", features, theta), -1)
        path.append(policy)
    return path


COSTS = "J_ATV", "D_ATV J_TV", "eps D_ATV", "delta D_TV"  # what Corollary 4.5 subtracts


def promises(mdp, old_policy, policy, epsilon, temperature):
    """Every term of Corollaries 4.4 and 4.5 for `policy`, as gains over eta(pi_0): dict of [M] ("V", "27": [M, S]).

    D^TV has no factor 1/2, like the paper's (Eq. 11).
    """
    old, new = evaluate(mdp, old_policy), evaluate(mdp, policy)
    best, soft = optimal_policy(old.q_value, old_policy, 1 - epsilon, 1 + epsilon, temperature)
    gain_per_state = state_gain(soft, old_policy, 1 - epsilon, 1 + epsilon, temperature)
    d_tv = np.abs(best - policy).sum(-1)  # Eq. 11
    d_atv = expect(np.abs(best - policy), np.abs(old.advantage))  # Eq. 12
    per_state = gain_per_state - d_atv
    horizon = 1 / (1 - mdp.gamma)
    terms = {
        "eps B": expect(evaluate(mdp, best).visitation, gain_per_state),
        "J_ATV": expect(old.visitation, d_atv),  # Eq. 13
        "D_ATV J_TV": d_atv.max(-1) * horizon * expect(old.visitation, d_tv),
        "eps D_ATV": mdp.gamma * epsilon * d_atv.max(-1) * horizon**2,
        "delta D_TV": mdp.gamma * gain_per_state.max(-1) * d_tv.max(-1) * horizon**2,
    }
    terms["4.5"] = terms["eps B"] - sum(terms[name] for name in COSTS)
    terms["4.4"] = expect(new.visitation, per_state)
    terms["4.4, d_pi0"] = expect(old.visitation, per_state)
    # (I - gamma P)^-1 x is the value of a policy that earns x(s) whatever it does.
    value = evaluate(mdp._replace(reward=np.broadcast_to(per_state[..., None], policy.shape)), policy).value
    terms["V"], terms["27"] = new.value - old.value, value
    terms["gain"] = new.eta - old.eta
    return terms


# 5. The losses of PPO


def ppo_loss(ratio, advantage, epsilon):
    """Minus the integrand of Eq. 17, elementwise."""
    return -np.minimum(np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage, ratio * advantage)


def ppo_equivalent_printed(ratio, advantage, epsilon):
    """l' of Eq. 7 and Proposition 4.6 as printed, elementwise: 0 on both sides of the band."""
    inside = np.abs(advantage) * np.abs(ratio - (1 + epsilon * np.sign(advantage)))
    return np.where(np.abs(ratio - 1) <= epsilon, inside, 0.0)


def ppo_equivalent(ratio, advantage, epsilon):
    """l' as Appendix A.5 derives it before its last rearrangement: 0 beyond the target, never on the far side."""
    sign = np.sign(advantage)
    return np.abs(advantage) * np.maximum(0, sign * (1 + epsilon * sign - ratio))


def policy_loss(ratio, target, advantage, tv_coef):
    """The integrand of Eq. 16, elementwise; tv_coef is alpha_1."""
    return np.abs(target - ratio) * (np.abs(advantage) + tv_coef)


# 6. The claims, as rows of the table


def yes_no(source, claim, measured, ok):
    """Row of a claim that is a plain yes or no."""
    return Row(source, claim, measured, "holds" if ok else "FAILS")


def compare(source, claim, left, right, equal=False, floor=TINY):
    """Row of the claim left >= right (left == right if `equal`), relative to the larger magnitude, at least `floor`."""
    left, right = (x.ravel() for x in np.broadcast_arrays(np.asarray(left, float), np.asarray(right, float)))
    slack = (left - right) / np.maximum(np.maximum(np.abs(left), np.abs(right)), floor)
    violation = np.abs(slack) if equal else -slack
    bad = ~(violation <= TOLERANCE)  # a nan is a violation
    if bad.any():
        i = np.lexsort((np.abs(left - right), violation))[-1]  # of equally bad ones the largest difference
        measured = f"violated in {bad.sum()} of {bad.size}; worst, no. {i}: {left[i]:.6g} against {right[i]:.6g}"
        return Row(source, claim, measured, "FAILS")
    if np.abs(slack).max() <= TOLERANCE:
        return Row(source, claim, f"{bad.size} cases, equal within {np.abs(slack).max():.0e}", "holds, equality")
    return Row(source, claim, f"{bad.size} cases, relative slack {slack.min():.1e} to {slack.max():.1e}", "holds")


def sign_balance(q_value, probabilities):
    """min over every real mu of |E[sign(Q - mu)]| for one state [A]: condition (10) holds where it is 0."""
    values, index = np.unique(q_value, return_inverse=True)
    below = np.cumsum(np.bincount(index, probabilities))  # P(Q <= v)
    at = np.diff(below, prepend=0)
    return min(np.abs(1 - 2 * below).min(), np.abs(1 - 2 * below + at).min())  # mu just above a value, mu on it


def check_optimum(mdp, old_policy, args, rng):
    """Rows for Theorem 4.1, Corollary 4.7 and the text around them."""
    old = evaluate(mdp, old_policy)
    q, temperature, symmetric = old.q_value, args.temperature, (1 - args.epsilon, 1 + args.epsilon)
    for source, (_, low, high) in zip(("Thm 4.1", "Cor 4.7"), cases(args), strict=True):
        best, soft = optimal_policy(q, old_policy, low, high, temperature)
        yield compare(source, "pi* is normalised", best.sum(-1), 1, equal=True)
        random_q = rng.normal(size=(10, *q.shape))  # the optimum for other Q is feasible for this one
        rivals = [old_policy, *(optimal_policy(x, old_policy, low, high, 0.3)[0] for x in random_q)]
        policies = np.array([best, *rivals])
        ratio = np.clip(policies / old_policy, low, high)  # the division may round to just outside the bounds
        regularised = expect(policies, q) - temperature * expect(old_policy, regularizer(ratio, low, high))
        objective = expect(old.visitation, regularised)  # Problems (9) and (18)
        yield compare(source, "objective of pi* >= 11 feasible rivals'", objective[0], objective[1:])
        rival_mu = np.linspace(q.min(-1), q.max(-1), 201)[..., None]
        losses = expect(old_policy, median_loss(q, rival_mu, low, high, temperature))
        at_root = expect(old_policy, median_loss(soft, 0, low, high, temperature))
        yield compare(source, "mu minimises E[g(x)] (201 rivals)", losses, at_root)
    # The printed g, taken at x = (Q-mu)/lambda, has the soft median of temperature lambda^2/2; pi* still uses lambda.
    printed = soft_median_advantage(q, old_policy, *symmetric, 0.1**2 / 2)
    total = expect(old_policy, target_ratio(printed, *symmetric, 0.1))
    yield compare("Thm 4.1, printed", "g with e^(+-x/lambda) normalises pi*, lambda .1", total, 1, equal=True)
    best, _ = optimal_policy(q, old_policy, *symmetric, temperature)
    surrogate = old.eta + expect(old.visitation, expect(best, old.advantage))  # Eq. 3
    by_q = expect(old.visitation, expect(best, q))
    yield compare("A.1, printed", "L(pi) = E_d_pi0[rho Q]", surrogate, by_q, equal=True)
    constant = old.eta - expect(old.visitation, old.value)  # the same for every pi, so the maximiser is untouched
    yield compare("A.1, corrected", "L(pi) = E[rho Q] + eta(pi0) - E[V]", surrogate, by_q + constant, equal=True)
    epsilon = np.linspace(0.05, 0.95, 19)[:, None]
    cost = regularizer(1 + epsilon * np.linspace(-0.999, 0.999, 201), 1 - epsilon, 1 + epsilon)
    yield compare("Eq. 9, printed", "H(rho) < 0 for every epsilon", 0, cost)
    yield compare("Eq. 9, corrected", "H(rho) <= 2 eps log(2 eps)", 2 * epsilon * np.log(2 * epsilon), cost)
    inside = args.ratio_low + (args.ratio_high - args.ratio_low) * np.linspace(0, 1, 201)
    cost, at_one = (regularizer(x, args.ratio_low, args.ratio_high) for x in (inside, 1.0))
    yield compare("Eq. 18, printed", "H' takes its maximum at rho = 1", at_one, cost)
    yield compare("Eq. 18, corrected", "H' takes its minimum at rho = 1", cost, at_one)


def linear_program(weight, old_policy, ratio_low, ratio_high):
    """max of sum_sa weight pi over Problem (4) for one MDP, [S, A] each, by HiGHS."""
    p, scale = old_policy.ravel(), np.abs(weight).max() or 1.0  # HiGHS stops at an absolute 1e-7: give it order 1
    sums = np.kron(np.eye(len(weight)), np.ones(weight.shape[1]))
    bounds = np.stack([ratio_low * p, ratio_high * p], -1)
    return -scale * linprog(-weight.ravel() / scale, A_eq=sums, b_eq=np.ones(len(weight)), bounds=bounds).fun


def check_limit(mdp, old_policy, args, rng):
    """Rows for lambda -> 0: Remark 4.3, the linear program (20 MDPs) and the cross-entropy method."""
    epsilon, symmetric = args.epsilon, (1 - args.epsilon, 1 + args.epsilon)
    mdp, old_policy = first(mdp, 20), old_policy[:20]
    old = evaluate(mdp, old_policy)
    weight = old.visitation[..., None] * old.advantage
    for name, low, high in ("c_l, c_h", args.ratio_low, args.ratio_high), ("1 -+ epsilon", *symmetric):
        optimum = np.array([linear_program(w, p, low, high) for w, p in zip(weight, old_policy, strict=True)])
        exact = (weight * limit_policy(old.q_value, old_policy, low, high)).sum((-1, -2))  # L(pi) - eta(pi_0)
        yield compare("Problem 4", f"linear program = quantile policy, {name}", exact, optimum, equal=True)
    temperatures = 10.0 ** -np.arange(5)
    policies = np.array([optimal_policy(old.q_value, old_policy, *symmetric, t)[0] for t in temperatures])
    closed = (weight * policies).sum((-1, -2))
    # pi* loses at most lambda (max H - min H) = 2 epsilon lambda log 2 per unit of visitation.
    allowed = 2 * epsilon * np.log(2) / (1 - mdp.gamma) * temperatures[:, None]
    yield compare(
        "Remark 4.3", "L(pi*) >= LP - 2 eps lambda log2/(1-gamma)", old.eta + closed, old.eta + optimum - allowed
    )
    gaps = np.max(optimum - closed, 1)
    measured = "largest gap " + ", ".join(f"{gap:.0e}" for gap in gaps)
    shrinks = (np.diff(gaps) < 0) | (gaps[1:] <= TOLERANCE)  # below it is rounding
    yield yes_no("Remark 4.3", "L(pi*) -> LP: lambda 1, .1, .. 1e-4", measured, shrinks.all())
    uniform = np.full(mdp.reward.shape, 1 / mdp.reward.shape[-1])
    before = evaluate(mdp, uniform)
    median_advantage = before.q_value - np.median(before.q_value, -1, keepdims=True)
    after = evaluate(mdp, uniform * (1 + epsilon * np.sign(median_advantage)))  # Eq. 5
    gain = epsilon * expect(after.visitation, expect(uniform, np.abs(median_advantage)))
    yield compare("Eq. 5-6", "uniform pi0: eta(pi*) = eta(pi0) + eps B", after.eta, before.eta + gain, equal=True)
    states = zip(old.q_value.reshape(-1, weight.shape[-1]), old_policy.reshape(-1, weight.shape[-1]), strict=True)
    balanced = [sign_balance(*state) < TOLERANCE for state in states]
    measured = f"in {sum(balanced)} of {len(balanced)} random states"
    yield Row("Remark 4.3", "how often the sign form (5) is normalised", measured, "measured")
    quarter, pair = np.array([0.25, 0.75]), np.array([0.0, 1.0])
    balance = sign_balance(pair, quarter)
    yield yes_no("Remark 4.3", "pi0 = 1/4, 3/4: no mu satisfies (10)", f"min |E sign| = {balance:g}", balance > 0)
    ratio = optimal_policy(pair, quarter, *symmetric, 1e-4)[0] / quarter
    limit = [1 - epsilon, 1 + epsilon / 3]
    yield compare("Remark 4.3", "there pi*/pi0 -> (1 - eps, 1 + eps/3)", ratio, limit, equal=True)
    a = np.linspace(0, 1, 2001)
    low, high = np.maximum(0.4 - a, TINY), np.maximum(a - 0.75, TINY)
    balance = sign_balance(np.exp(-1 / high) - np.exp(-1 / low), np.full(a.size, 1 / a.size))  # C-infinity in a
    measured = f"Q flat on [.4, .75]: min |E sign| = {balance:.3f}"
    yield yes_no("Remark 4.3, printed", "uniform pi0 and smooth Q satisfy (10)", measured, balance < 1e-3)
    uniform, q = np.full(20, 1 / 20), rng.permutation(20) / 20
    found, elite = optimal_policy(q, uniform, 0.0, 4.0, 1e-4)[0], np.where(q >= 15 / 20, 4 / 20, 0)
    yield compare("Sec 4.6, CEM", "c_l = 0, c_h = 4: the top 5 of 20, 1/5 each", found, elite, equal=True, floor=1)
    found, elite = optimal_policy(q, uniform, 0.0, 3.0, 1e-4)[0], limit_policy(q, uniform, 0.0, 3.0)
    claim = f"c_l = 0, c_h = 3: 6 at 3/20, the 7th at {np.sort(elite)[-7]:.2f}"
    yield compare("Sec 4.6, CEM", claim, found, elite, equal=True, floor=1)


def closest_policy(target, advantage):
    """Ratios [G] nearest to the targets by Eq. 12, of all that average to 1 over G equally likely completions."""
    size, eye = len(target), np.eye(len(target))
    cost = np.append(np.zeros(size), np.abs(advantage))  # of |target - ratio|, the last G variables
    above, below = np.hstack([eye, -eye]), np.hstack([-eye, -eye])
    mean = np.append(np.full(size, 1 / size), np.zeros(size))[None]
    return linprog(cost, np.vstack([above, below]), np.append(target, -target), mean, [1]).x[:size]


def check_groups(epsilon, rng, size=8):
    """Rows for GBPO's targets (section 4.5) on groups of `size` completions: the plain median's, and Theorem 4.1's."""
    zero_one = np.tri(size - 1, size)  # 1 to G - 1 right completions
    graded = np.array([rng.choice(rng.random(3), size) for _ in range(1000)])
    share, p = zero_one.mean(-1), np.full_like(zero_one, 1 / size)
    gain = expect(limit_policy(zero_one, p, 1 - epsilon, 1 + epsilon), zero_one) - share
    least = epsilon * np.minimum(share, 1 - share)
    yield compare("GBPO, exact", "0/1 rewards: gain = eps min(p, 1 - p)", gain, least, equal=True)
    for name, rewards in ("0/1 rewards", zero_one), ("graded rewards", graded[np.ptp(graded, -1) > 0]):
        p, advantage = np.full_like(rewards, 1 / size), rewards - rewards.mean(-1, keepdims=True)
        exact = limit_policy(rewards, p, 1 - epsilon, 1 + epsilon) / p
        plain = 1 + epsilon * np.sign(rewards - np.median(rewards, -1, keepdims=True))
        nearest = np.array([closest_policy(*x) for x in zip(plain, advantage)])
        gain, best = expect(p, nearest * advantage), expect(p, exact * advantage)
        distance = expect(p, np.abs(plain - nearest) * np.abs(advantage))
        promise = (expect(p, (plain - 1) * advantage) - distance) / best  # Corollary 4.4; with exact targets it is 1
        yield compare("GBPO, median", f"{name}: its targets average to 1", expect(p, plain), 1, equal=True)
        yield compare("GBPO, median", f"{name}: nearest policy gains as much", gain, best, equal=True, floor=0.1)
        measured = f"{promise.min():.3g} to {promise.max():.3g}, median {np.median(promise):.3g}, of the exact target's"
        yield Row("GBPO, median", f"{name}: promised by Cor 4.4", measured, "measured")


def check_guarantees(mdp, old_policy, args):
    """Rows for Theorem 4.2, Corollary A.3, and the bounds of TRPO and CPI beside them."""
    old, summary = evaluate(mdp, old_policy), []
    best_gain = np.maximum(optimal_return(mdp) - old.eta, TINY)
    for source, low, high in cases(args):
        best, soft = optimal_policy(old.q_value, old_policy, low, high, args.temperature)
        new, gain = evaluate(mdp, best), state_gain(soft, old_policy, low, high, args.temperature)
        left, lemma = expect(best, old.q_value), f"{source}, Lemma A.1" if source == "Thm 4.2" else "A.7, last equation"
        yield compare(lemma, "E_pi*[Q(s,.)] = V(s) + gain(s)", left, old.value + gain, equal=True)
        exact = expect(new.visitation, gain)  # epsilon B, (c_h-1) B'
        yield compare(source, "eta(pi*) >= eta(pi0) + E_d_pi*[gain(s)]", new.eta, old.eta + exact)
        yield yes_no(source, "gain(s) >= 0 in every state", f"least {gain.min():.1e}", np.all(gain >= 0))
        yield compare(source, "V_pi*(s) >= V_pi0(s) in every state", new.value, old.value)
        by_old = old.eta + expect(old.visitation, gain)
        yield compare(f"{source}, d_pi0", "the same over the states of pi0", new.eta, by_old)
        data = gain_from_old_data(mdp, old_policy, gain, low)
        yield compare(f"{source}, ours", "the same, pi0 at discount c_l gamma", new.eta, old.eta + data)
        name = f"BRRL [{low:g}, {high:g}]"
        summary += [(name, exact, new.eta - old.eta), (f"{name}, pi0's data", data, new.eta - old.eta)]
        if source == "Cor A.3":
            symmetric = 1 - args.epsilon, 1 + args.epsilon
            unprimed = soft_median_advantage(old.q_value, old_policy, *symmetric, args.temperature)
            printed = state_gain(soft, old_policy, low, high, args.temperature, tanh_advantage=unprimed)
            printed = old.eta + expect(new.visitation, printed)
            yield compare("Cor A.3, printed", "the same with tanh(A~/2lambda) A~, unprimed", new.eta, printed)

    trpo, (mixed, greedy, alpha) = trpo_step(mdp, old_policy, old), cpi_step(mdp, old_policy, old)
    best, _ = optimal_policy(old.q_value, old_policy, 1 - args.epsilon, 1 + args.epsilon, args.temperature)
    for name, policy in ("TRPO's best step", trpo), ("BRRL's pi*", best):
        bound, eta = np.subtract(*trpo_bound(mdp, old_policy, old, policy)), evaluate(mdp, policy).eta
        yield compare("TRPO, Thm 1", f"its bound, at {name}", eta, old.eta + bound)
        summary.append((f"TRPO's bound, {name}", bound, eta - old.eta))
    small, _ = optimal_policy(old.q_value, old_policy, 1 - args.epsilon / 1e3, 1 + args.epsilon / 1e3, args.temperature)
    surrogate, penalty = trpo_bound(mdp, old_policy, old, small)
    measured = f"gain > penalty at pi*(eps/1000) in {np.mean(surrogate > penalty):.1%} of MDPs"
    yield yes_no("Sec 4.2, printed", "TRPO's bound has no positive term", measured, np.all(surrogate <= 0))
    bound, eta = np.subtract(*cpi_bound(mdp, old, greedy, alpha)), evaluate(mdp, mixed).eta
    summary.append(("CPI, alpha*", bound, eta - old.eta))
    yield compare("CPI, Eq. 59-60", "its bound, at alpha = alpha*", eta, old.eta + bound)
    rivals = [np.subtract(*cpi_bound(mdp, old, greedy, x)) for x in np.linspace(0, 1, 501)]
    yield compare("CPI, Eq. 61", "alpha* maximises the bound (501 rivals)", bound, rivals)
    for mix in (0.1, 0.5, 1.0):
        bound = np.subtract(*cpi_bound(mdp, old, greedy, mix))
        eta = evaluate(mdp, (1 - mix) * old_policy + mix * greedy).eta
        yield compare("CPI, Eq. 59-60", f"its bound, at alpha = {mix}", eta, old.eta + bound)
    for name, promised, real in summary:
        promised, real = (f"{100 * np.median(x / best_gain):.3g}%" for x in (promised, real))
        measured = f"median: promised {promised}, real {real}"
        yield Row(name, "gain, share of the way to the optimum", measured, "measured")


def check_parameterised(mdp, args, rng, num_features=6, num_steps=20):
    """Rows for Corollaries 4.4 and 4.5 on softmax policies with `num_features` random features."""
    features = rng.normal(size=(*mdp.reward.shape, num_features))
    theta, setting = rng.normal(size=(len(mdp.reward), num_features)), (args.epsilon, args.temperature)
    old_policy, *path = bpo_gradient_steps(mdp, features, theta, *setting, num_steps)
    old = evaluate(mdp, old_policy)
    best, _ = optimal_policy(old.q_value, old_policy, 1 - args.epsilon, 1 + args.epsilon, args.temperature)
    anywhere = rng.dirichlet(np.ones(old_policy.shape[-1]), old_policy.shape[:-1])
    for name, policies in (f"{num_steps} steps on Eq. 16", path), ("random policies", [anywhere]), ("pi*", [best]):
        terms = [promises(mdp, old_policy, policy, *setting) for policy in policies]
        eta = old.eta + [t["gain"] for t in terms]
        for source in ("4.4", "4.5"):
            yield compare(f"Cor {source}", f"at {name}", eta, old.eta + [t[source] for t in terms])
        value = old.value + [t["V"] for t in terms]
        yield compare("A.3, Eq. 27", f"at {name}, every state", value, old.value + [t["27"] for t in terms])
    terms = promises(mdp, old_policy, path[-1], *setting)
    yield compare("Cor 4.4, d_pi0", f"after {num_steps} steps", old.eta + terms["gain"], old.eta + terms["4.4, d_pi0"])
    unit = np.maximum(terms["eps B"], TINY)
    for key, name in ("gain", "true gain"), ("4.4", "promised by 4.4"), ("4.5", "promised by 4.5"):
        measured = f"median {np.median(terms[key] / unit):+.3g} eps B, positive in {np.mean(terms[key] > 0):.1%}"
        yield Row("Looseness", f"after {num_steps} steps: {name}", measured, "measured")
    measured = ", ".join(f"{key} {np.median(terms[key] / unit):.2f}" for key in COSTS)
    yield Row("Looseness", "what 4.5 subtracts, medians in eps B", measured, "measured")
    distance = np.geomspace(1, 1e-3, 49)  # x in pi_theta = x pi_0 + (1-x) pi*
    mixtures = [promises(mdp, old_policy, x * old_policy + (1 - x) * best, *setting) for x in distance]
    for source in ("4.4", "4.5"):
        gains = np.array([m[source] > TOLERANCE * m["eps B"] for m in mixtures])
        needed = np.median(np.where(gains.any(0), distance[gains.argmax(0)], 0))  # 0: only closer to pi* than 1e-3
        claim = f"pi* + x (pi0 - pi*): {source} promises a gain"
        yield Row("Looseness", claim, f"first at x = {needed:.2g} (median)", "measured")
    losses = old.visitation[..., None] * policy_loss(path[0] / old_policy, best / old_policy, old.advantage, 0.0)
    j_atv = promises(mdp, old_policy, path[0], *setting)["J_ATV"]
    for source, name, sampled in ("printed", "pi", path[0]), ("corrected", "pi0", old_policy):
        left = (sampled * losses).sum((-1, -2))
        yield compare(f"Sec 4.4, {source}", f"J_ATV = E_(d_pi0, a~{name})[l_BPO]", left, j_atv, equal=True)
    # After Cor 4.5: pi_0 in the class and small epsilon guarantee a gain. Here two states share one action
    # distribution and want opposite actions: nothing in the class gains, whatever epsilon.
    reward, half = np.tile(np.eye(2), (41, 1, 1)), np.full((41, 2, 2), 0.5)
    shared, smallest = make_mdp(np.full((41, 2, 2, 2), 0.5), reward, half[..., 0], 0.9), np.inf
    for epsilon in (1e-1, 1e-2, 1e-3, 1e-4):
        p = 0.5 + np.linspace(-epsilon, epsilon, 41)[:, None]
        terms = promises(shared, half, np.stack([p, 1 - p], -1) + np.zeros((41, 2, 2)), epsilon, 0.01)
        smallest = min(smallest, np.min(terms["J_ATV"] / terms["eps B"]))
    measured = f"J_ATV >= {smallest:.6g} eps B at eps = .1 .. 1e-4"
    yield yes_no("Sec 4.2, printed", "small eps makes 4.5 guarantee a gain", measured, smallest < 1 - TOLERANCE)


def check_ppo(epsilon):
    """Rows for Proposition 4.6."""
    ratio, advantage = np.linspace(0, 2.5, 501), np.array([-2.0, -0.5, 0.5, 2.0])[:, None]
    shifted = ppo_loss(ratio, advantage, epsilon) + (1 + epsilon * np.sign(advantage)) * advantage
    printed, band = ppo_equivalent_printed(ratio, advantage, epsilon), np.abs(ratio - 1) <= epsilon
    ours, equal = ppo_equivalent(ratio, advantage, epsilon), {"equal": True, "floor": 1}
    yield compare("Prop 4.6, printed", "l' = l_PPO + constant, ratios 0 to 2.5", printed, shifted, **equal)
    yield compare("Prop 4.6, printed", "only where |rho-1| <= eps", printed[:, band], shifted[:, band], **equal)
    yield compare("Prop 4.6, corrected", "l' = l_PPO + constant, ratios 0 to 2.5", ours, shifted, **equal)
    two, bad = 1 + (1 + epsilon) / 2 * np.array([1, -1]), np.array([-1.0, 1.0])  # pi_0 = 1/2, 1/2; A = -1, 1
    loss, surrogate = ppo_equivalent_printed(two, bad, epsilon).mean(), (two * bad).mean()
    measured = f"J' = {loss:g}, its least, at surrogate gain {surrogate:+.2g}"
    yield yes_no("Prop 4.6, printed", "a minimiser of J' does not lose", measured, loss > 0 or surrogate >= 0)


def check_toys(args):
    """Rows for the alignment text's pathologies (sections 4.1.1 and 4.1.2), with its numbers."""
    gamma, penalty, eta1, eta2 = 0.9, 100.0, 1e-4, 1e-3
    transition, reward = np.zeros((1, 3, 2, 3)), np.zeros((1, 3, 2))
    transition[0, 0, 0, 2] = transition[0, 0, 1, 1] = 1  # s0: a0 ends, a1 leads to s1
    transition[0, 1:, :, 2] = 1  # s1 (actions g, b) and the absorbing state end
    reward[0, 1] = 1.0, -penalty
    mdp = make_mdp(transition, reward, np.array([[1.0, 0, 0]]), gamma)

    def policy(to_s1, bad):
        return np.array([[[1 - to_s1, to_s1], [1 - bad, bad], [0.5, 0.5]]])

    old_policy, candidate, near = policy(eta1, eta2), policy(1.0, 1.0), policy(0.09, 0.99)
    old = evaluate(mdp, old_policy)
    surrogate = [expect(old.visitation, expect(p, old.advantage)).item() for p in (candidate, near)]
    yield compare("Toy 4.1.1", "J(pi) = 8.091e-5", old.eta, 8.091e-5, equal=True)
    yield compare("Toy 4.1.1", "J(pi') = -90", evaluate(mdp, candidate).eta, -90, equal=True)
    measured = f"{surrogate[0]:.8f}"
    yield yes_no("Toy 4.1.1", "surrogate gain 0.79994", measured, abs(surrogate[0] - 0.79994) < 5e-6)
    greedy = evaluate(mdp, np.eye(2)[old.advantage.argmax(-1)]).eta.item()
    yield Row("Toy 4.1.1", "J of the surrogate's own maximiser", f"{greedy:g}, the optimum", "measured")
    kl = expect(old.visitation, expect(old_policy, np.log(old_policy / near))).item() * (1 - gamma)
    eta = evaluate(mdp, near).eta.item()
    measured = f"mean KL {kl:.4f}, surrogate gain {surrogate[1]:+.3f}, J = {eta:.2f}"
    ok = eta >= old.eta.item() or kl > 0.01 or surrogate[1] <= 0
    yield yes_no("Toy 4.1.1, Eq. 67", "mean KL <= .01, surrogate gain > 0: J rises", measured, ok)
    best, _ = optimal_policy(old.q_value, old_policy, 1 - args.epsilon, 1 + args.epsilon, args.temperature)
    yield compare("Toy 4.1.1", "BRRL: eta(pi*) >= eta(pi0)", evaluate(mdp, best).eta, old.eta)

    behaviour, target = np.array([0.5, 0.5]), np.array([0.1, 0.9])
    for horizon in (5, 10):  # every one of the 2^H action sequences, no closed form
        sequences = np.array(list(itertools.product((0, 1), repeat=horizon)))
        weight, probability = (target / behaviour)[sequences].prod(1), behaviour[sequences].prod(1)
        variance, closed = expect(probability, weight**2) - expect(probability, weight) ** 2, 1.64**horizon - 1
        yield compare("Toy 4.1.2", f"Var w = 1.64^{horizon} - 1 = {closed:.4g}", variance, closed, equal=True)
    horizon = 5
    transition = np.eye(horizon + 1, k=1)[None, :, None, :]
    transition[0, -1, 0, -1] = 1
    chain = make_mdp(transition, np.eye(horizon + 1)[-1:, :, None], np.eye(horizon + 1)[:1], gamma)
    value, text = evaluate(chain, np.ones((1, horizon + 1, 1))).eta, "r(absorbing) = 1 returns gamma^H"
    yield compare("Toy 4.1.2, printed", text, value, gamma**horizon, equal=True)
    yield compare("Toy 4.1.2, corrected", f"{text}/(1-gamma)", value, gamma**horizon / (1 - gamma), equal=True)


def brrl_iteration(mdp, policy, ratio_low, ratio_high, temperature, best_return, max_iterations):
    """Repeats Corollary 4.7 exactly until every return is within 1e-9 relative of `best_return` [M].

    Returns the returns [K + 1, M] and the promised gains (c_h - 1) B' [K, M], which Theorem 4.2 calls epsilon B.
    """
    old = evaluate(mdp, policy)
    returns, promised = [old.eta], []
    while np.any(best_return - old.eta > TOLERANCE * np.abs(best_return)) and len(promised) < max_iterations:
        best, soft = optimal_policy(old.q_value, policy, ratio_low, ratio_high, temperature)
        gain = state_gain(soft, policy, ratio_low, ratio_high, temperature)
        policy, old = best, evaluate(mdp, best)
        returns.append(old.eta)
        promised.append(expect(old.visitation, gain))
    return np.array(returns), np.array(promised).reshape(-1, len(best_return))


def check_iteration(mdp, old_policy, args):
    """Rows for exact BRRL policy iteration to the optimal return, on up to 10 of the MDPs."""
    few = first(mdp, 10)
    best_return = optimal_return(few)
    for source, low, high in cases(args):
        settings = (min(args.temperature, 1e-4), 2000), (args.temperature, 50)
        runs = [brrl_iteration(few, old_policy[:10], low, high, x, best_return, limit) for x, limit in settings]
        gaps = [np.max((best_return - returns[-1]) / best_return) for returns, _ in runs]
        measured = [f"relative gap {x:.0e} after {len(run[1])} iterations" for x, run in zip(gaps, runs, strict=True)]
        name, claim = f"{source}, iterated", f"return -> value iteration's, lambda = {settings[0][0]:g}"
        yield yes_no(name, claim, measured[0], gaps[0] <= TOLERANCE)
        # An action worth delta less than the best fades by 1 - eps tanh(delta / 2 lambda) only: ties take long.
        yield Row(name, f"the same, lambda = {args.temperature:g}", measured[1], "measured")
        for (temperature, _), (returns, promised) in zip(settings, runs, strict=True):
            claim = f"each step gains its promise, lambda = {temperature:g}"
            yield compare(name, claim, returns[1:], returns[:-1] + promised)
    policy, new = None, old_policy[:10]
    while not np.array_equal(policy, new):
        policy = new
        new = limit_policy(evaluate(few, policy).q_value, policy, 0.0, 4.0)
    gap = (best_return - evaluate(few, policy).eta) / best_return
    lost = np.sum(gap > TOLERANCE)  # an action cut to 0 never comes back
    measured = f"{lost} of {len(best_return)} MDPs stop below it"
    yield yes_no("CEM, iterated", "c_l = 0, lambda = 0: return -> value iteration's", measured, lost == 0)


# 7. Figures


def plot_losses(path, epsilon):
    """The paper's Figure 3, redrawn; panel (b) shows Proposition 4.6 as printed and corrected."""
    ratio, signs = np.linspace(0, 2, 801), ((1.0, "goldenrod", "A > 0"), (-1.0, "tab:blue", "A < 0"))
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    gap = np.abs(np.abs(ratio - 1) - epsilon) < 2e-3  # no vertical stroke where the printed loss jumps
    x = np.linspace(-1, 1, 401)
    axes[2].plot(x[x > 0], np.full(np.sum(x > 0), 1 + epsilon), color="goldenrod")
    axes[2].plot(x[x < 0], np.full(np.sum(x < 0), 1 - epsilon), color="tab:blue")
    for sign, color, label in signs:
        axes[0].plot(ratio, ppo_loss(ratio, sign, epsilon), color=color, label=label)
        corrected = ppo_equivalent(ratio, sign, epsilon)
        axes[1].plot(ratio, corrected, color=color, linewidth=4, alpha=0.5, label=f"{label}, corrected")
        printed = np.where(gap, np.nan, ppo_equivalent_printed(ratio, sign, epsilon))
        dashes = (0 if sign > 0 else 6, (5, 7))  # interleaved: both printed losses are 0 outside the band
        axes[1].plot(ratio, printed, color=color, linestyle=dashes, zorder=3, label=f"{label}, as printed")
        axes[3].plot(ratio, policy_loss(ratio, 1 + epsilon * sign, sign, 0.0), color=color, label=label)
    titles = "(a) PPO loss", "(b) its equivalent, Prop. 4.6", "(c) optimal ratio, Problem (4)", "(d) BPO loss, Eq. 8"
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="ratio", ylabel="loss, |A| = 1")
        axis.grid(alpha=0.3)
    axes[2].set(xlabel="median advantage", ylabel="ratio", ylim=(0.5, 1.5))
    for axis in (axes[0], axes[1], axes[3]):
        axis.legend(loc="upper center", fontsize=8)
        axis.margins(y=0.25)
    figure.savefig(path, dpi=90)


def plot_ratios(path, args):
    """Optimal ratio against the soft-median advantage for several lambda: Theorem 4.1 and Corollary 4.7."""
    x = np.linspace(-1, 1, 801)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (_, low, high) in zip(axes, cases(args), strict=True):
        for i, temperature in enumerate((1.0, 0.3, 0.1, 0.03, 0.001)):
            color = colormaps["viridis"](0.9 - i / 5)
            axis.plot(x, target_ratio(x, low, high, temperature), color=color, label=rf"$\lambda$ = {temperature:g}")
        for bound in (low, 1.0, high):
            axis.axhline(bound, color="gray", linewidth=0.7, linestyle="--")
        axis.set(title=f"Ratios in [{low:g}, {high:g}]", xlabel="Q - soft quantile", ylabel="optimal ratio")
        axis.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=90)


def plot_improvement(path, mdp, old_policy, args, num_iterations=150):
    """Gap to the optimum, and gain promised and real, of BRRL, CPI and TRPO steps on the first MDP.

    Returns the step at which each comes within 1e-9 of the optimum, or None: a dict.
    """
    one, bounds = first(mdp, 1), (1 - args.epsilon, 1 + args.epsilon)
    best_return, arrivals = optimal_return(one), {}

    def brrl(policy, old):
        best, soft = optimal_policy(old.q_value, policy, *bounds, args.temperature)
        return best, gain_from_old_data(one, policy, state_gain(soft, policy, *bounds, args.temperature), bounds[0])

    def cpi(policy, old):
        mixed, greedy, alpha = cpi_step(one, policy, old)
        return mixed, np.subtract(*cpi_bound(one, old, greedy, alpha))

    def trpo(policy, old):
        new = trpo_step(one, policy, old)
        return new, np.subtract(*trpo_bound(one, policy, old, new))

    def trpo_kl(policy, old):
        return trpo_step(one, policy, old, max_kl=0.01), np.full(1, np.nan)

    steps = [(f"BRRL, epsilon = {args.epsilon:g}", brrl, "tab:green"), ("CPI, best alpha of Eq. 61", cpi, "tab:red")]
    steps += [("TRPO, best step of its bound", trpo, "tab:blue"), ("TRPO, mean KL <= 0.01", trpo_kl, "tab:gray")]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, step, color in steps:
        policy, returns, promised = old_policy[:1], [], []
        for _ in range(num_iterations):
            old = evaluate(one, policy)
            policy, promise = step(policy, old)
            returns.append(old.eta.item())
            promised.append(promise.item())
        gap = best_return.item() - np.array(returns)
        reached = np.flatnonzero(gap <= TOLERANCE * best_return.item())
        arrivals[name] = int(reached[0]) if reached.size else None
        floor = 1e-12 * best_return.item()  # below it a gap is rounding
        axes[0].semilogy(np.where(gap > floor, gap, np.nan), color=color, label=name)
        gain = np.diff(returns)
        axes[1].semilogy(np.where(gain > floor, gain, np.nan), color=color)
        axes[1].semilogy(np.where(np.array(promised) > floor, promised, np.nan), color=color, linestyle=":")
    axes[0].set(title="Gap to the optimal return", xlabel="iteration", ylabel="gap, units of return")
    axes[1].set(title="Gain of each step: real (solid), promised (dotted)", xlabel="iteration", ylabel="gain")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=90)
    return arrivals


def plot_cem(path):
    """The cross-entropy limit: probabilities of 20 actions after one update from a uniform policy, c_l = 0, c_h = 4."""
    q, uniform = np.linspace(1, 0, 20), np.full(20, 1 / 20)
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for i, temperature in enumerate((1.0, 0.1, 0.03, 0.001)):
        policy, _ = optimal_policy(q, uniform, 0.0, 4.0, temperature)
        axis.plot(
            range(1, 21), policy, "o-", color=colormaps["viridis"](0.9 - i / 4), label=rf"$\lambda$ = {temperature:g}"
        )
    axis.axvline(5.5, color="gray", linestyle="--", label="top quarter")
    axis.set(title="Cross-entropy limit: c_l = 0, c_h = 4, uniform old policy", xticks=range(1, 21, 2))
    axis.set(xlabel="rank of the action by Q", ylabel="probability after one update")
    axis.legend()
    figure.savefig(path, dpi=90)


def format_table(rows):
    """The rows as one aligned Markdown table."""
    table = [Row("source", "claim", "measured", "verdict"), *rows]
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in table)


def compute(args):
    """(rows of the whole table, the MDPs, their old policies [M, S, A]). Raises ValueError for bad `args`."""
    validate(args)
    rng = np.random.default_rng(args.seed)
    mdp = random_mdps(rng, args.num_mdps, args.num_states, args.num_actions, args.gamma)
    old_policy = rng.dirichlet(np.ones(args.num_actions), (args.num_mdps, args.num_states))
    rows = [*check_optimum(mdp, old_policy, args, rng), *check_limit(mdp, old_policy, args, rng)]
    rows += [*check_groups(args.epsilon, np.random.default_rng(args.seed)), *check_guarantees(mdp, old_policy, args)]
    rows += check_iteration(mdp, old_policy, args)
    rows += [*check_parameterised(mdp, args, rng), *check_ppo(args.epsilon), *check_toys(args)]
    return rows, mdp, old_policy


def main(args):
    """Checks everything, prints the table, writes it and the figures to `args.output_dir`."""
    start = time.time()
    rows, mdp, old_policy = compute(args)
    table, folder = format_table(rows), args.output_dir
    print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table + "\n")
    plot_losses(folder / "losses.png", args.epsilon)
    plot_ratios(folder / "ratios.png", args)
    for name, step in plot_improvement(folder / "improvement.png", mdp, old_policy, args).items():
        print(f"figure: {name}: 1e-9 of the optimum {'not reached' if step is None else f'at step {step}'}")
    plot_cem(folder / "cem.png")
    counts = [sum(row.verdict.startswith(verdict) for row in rows) for verdict in ("holds", "FAILS", "measured")]
    print(f"{counts[0]} hold, {counts[1]} fail, {counts[2]} measured; figures in {folder}; {time.time() - start:.0f} s")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        print(f"brrl_tabular.py: {error}", file=sys.stderr)
        sys.exit(2)
