"""The scalar end of every objective: group errors in, loss, weights and gradient coefficients out.

The formulas are those of `pgdpo_fast.objectives` with their derivatives written out; `KIND` and `FLAGS` are
compile-time, the hyper-parameters come from a small device tensor. All values are blocks of groups, in the
accumulation dtype.
"""

import triton
import triton.language as tl

# Mirrors of the constants in pgdpo_fast/objectives.py (a kernel may read module constants only as tl.constexpr).
KIND_DPO = tl.constexpr(0)
KIND_PGDPO = tl.constexpr(1)
KIND_IPO = tl.constexpr(2)
KIND_SLIC = tl.constexpr(3)
KIND_SFT = tl.constexpr(4)
KIND_DPOP = tl.constexpr(5)
KIND_DPO_SHIFT = tl.constexpr(6)
KIND_HINGE = tl.constexpr(7)
FLAG_ARS = tl.constexpr(1)
FLAG_IPR_REWARD = tl.constexpr(2)
FLAG_IPR_ANCHOR = tl.constexpr(4)
FLAG_ATTACHED = tl.constexpr(8)
FLAG_SAFEGUARD = tl.constexpr(64)
FLAG_IMPORTANCE = tl.constexpr(128)
FLAG_IPR_BETA = tl.constexpr(256)
FLAG_INSIDE = tl.constexpr(512)
FLAG_SAFEGUARD_BATCH = tl.constexpr(1024)
FLAG_TERM_WEIGHT = tl.constexpr(2048)
FLAG_TERM_WEIGHT_BETA = tl.constexpr(4096)
# A sum of objectives has bits of KIND and FLAGS for each term, the first lowest.
TERM_KIND_BITS = tl.constexpr(8)
TERM_FLAG_BITS = tl.constexpr(16)
TERM_LIMIT = tl.constexpr(4)
# Times a flag: that flag of every term.
EVERY_TERM = tl.constexpr(0x0001000100010001)
# Two bits of FLAGS say which ratio, an index into RATIOS there.
FLAG_RATIO_SHIFT = tl.constexpr(4)
FLAG_RATIO_MASK = tl.constexpr(3 << 4)
RATIO_LOGIT = tl.constexpr(0)
RATIO_SYMMETRIC = tl.constexpr(1)
RATIO_ABS = tl.constexpr(2)
RATIO_SIGNED = tl.constexpr(3)
RATIO_LIMIT = tl.constexpr(1e6)
# Places of an objective's numbers in the tensor behind params_ptr: the fields of Parameters there.
PARAMETER_HALF_BETA = tl.constexpr(0)
PARAMETER_K1 = tl.constexpr(1)
PARAMETER_K2 = tl.constexpr(2)
PARAMETER_IPR_SCALE = tl.constexpr(3)
PARAMETER_EPS = tl.constexpr(4)
PARAMETER_LABEL_SMOOTHING = tl.constexpr(5)
PARAMETER_TARGET = tl.constexpr(6)
PARAMETER_DELTA = tl.constexpr(7)
PARAMETER_WEIGHT = tl.constexpr(8)
PARAMETER_PENALTY = tl.constexpr(9)
PARAMETER_SHIFT = tl.constexpr(10)
PARAMETER_THRESHOLD = tl.constexpr(11)
PARAMETER_CLIP = tl.constexpr(12)
PARAMETER_MU = tl.constexpr(13)
PARAMETER_TERM_WEIGHT = tl.constexpr(14)
PARAMETERS = tl.constexpr(15)


@triton.jit
def sigmoids(x):
    """1 / (1 + exp(-x)) and 1 / (1 + exp(x)) from one exponential, without overflow for any finite x."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def rounding_and_slope(x, COMPUTE: tl.constexpr):
    """What rounds off the corner of softplus(x) = max(x, 0) + log1p(exp(-|x|)), the logarithm, and the slope of
    softplus, 1 / (1 + exp(-x)), from one exponential.

    log1p(t), 0 <= t <= 1, is good to full relative accuracy: in float32 t times a polynomial of least relative error
    (5e-9), in float64 by Kahan's correction.
    """
    t = tl.exp(-tl.abs(x))
    w = 1.0 + t
    large = 1.0 / w
    if COMPUTE == tl.float64:
        log1p = tl.where(w == 1.0, t, tl.log(w) * (t / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        series = 0.10603653639554977 + t * (
            -0.05695951730012894 + t * (0.019851453602313995 + t * -0.0032440233044326305)
        )
        series = 0.1967593878507614 + t * (-0.15305592119693756 + t * series)
        series = -0.4999990165233612 + t * (0.3332996368408203 + t * (-0.24954134225845337 + t * series))
        log1p = t * (1.0 + t * series)
    return log1p, tl.where(x >= 0, large, t * large)


@triton.jit
def softplus_and_slope(x, COMPUTE: tl.constexpr):
    """log(1 + exp(x)) and 1 / (1 + exp(-x))."""
    rounding, slope = rounding_and_slope(x, COMPUTE)
    return tl.maximum(x, 0.0) + rounding, slope


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def ratio_and_slopes(chosen, rejected, half_beta, eps, RATIO: tl.constexpr):
    """PG-DPO's rho and its derivatives by the chosen and the rejected reward."""
    margin = chosen - rejected
    if RATIO == RATIO_LOGIT:
        ratio = half_beta * margin
        by_chosen = half_beta + 0.0 * margin
        by_rejected = -by_chosen
    elif RATIO == RATIO_SYMMETRIC:
        inverse = 1.0 / (tl.abs(chosen) + tl.abs(rejected) + 1.0 / half_beta)
        ratio = margin * inverse
        by_chosen = (1.0 - ratio * sign(chosen)) * inverse
        by_rejected = (-1.0 - ratio * sign(rejected)) * inverse
    elif RATIO == RATIO_ABS:
        inverse = 1.0 / (tl.abs(rejected) + tl.abs(eps))
        ratio = margin * inverse
        by_chosen = inverse
        by_rejected = (-1.0 - ratio * sign(rejected)) * inverse
    else:  # signed, the pole cut to the limit
        at_pole = rejected + eps == 0
        inverse = tl.where(at_pole, 0.0, 1.0 / tl.where(at_pole, 1.0, rejected + eps))
        ratio = tl.where(at_pole, sign(margin) * RATIO_LIMIT, margin * inverse)
        by_chosen = inverse
        by_rejected = tl.where(at_pole, 0.0, (-1.0 - ratio) * inverse)
    inside = tl.abs(ratio) <= RATIO_LIMIT
    bounded = tl.where(inside, ratio, sign(ratio) * RATIO_LIMIT)
    bounded = tl.where(ratio != ratio, ratio, bounded)  # NaN stays NaN
    return bounded, tl.where(inside, by_chosen, 0.0), tl.where(inside, by_rejected, 0.0)


@triton.jit
def scaled_half_beta(params_ptr, beta_scale, BETA_SCALED: tl.constexpr):
    """beta / 2, times the groups' `beta_scale` with BETA_SCALED."""
    half_beta = tl.load(params_ptr + PARAMETER_HALF_BETA)
    if BETA_SCALED:
        half_beta = half_beta * beta_scale
    return half_beta


@triton.jit
def scaled_ipr(params_ptr, beta_scale, FLAGS: tl.constexpr, BETA_SCALED: tl.constexpr):
    """PG-DPO's weight of its regularizer; with kappa = beta / 2 it follows beta."""
    ipr_scale = tl.load(params_ptr + PARAMETER_IPR_SCALE)
    if BETA_SCALED:
        if FLAG_IPR_BETA & FLAGS:
            ipr_scale = ipr_scale * beta_scale
    return ipr_scale


@triton.jit
def pgdpo_terms(
    e_w,
    d_w,
    d_l,
    anchor,
    beta_scale,
    params_ptr,
    FLAGS: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """PG-DPO's parts: logits, preference term P and its slope by -logits, regularizer I, alpha, gamma, 1 - gamma, the
    ratio and its slopes."""
    half_beta = scaled_half_beta(params_ptr, beta_scale, BETA_SCALED)
    chosen = -d_w
    rejected = -d_l
    ratio, by_chosen, by_rejected = ratio_and_slopes(
        chosen, rejected, half_beta, tl.load(params_ptr + PARAMETER_EPS), (FLAG_RATIO_MASK & FLAGS) >> FLAG_RATIO_SHIFT
    )
    complement = tl.zeros_like(e_w)
    implicit = complement
    alpha = complement + 1.0
    gamma = alpha
    if FLAG_ARS & FLAGS:
        alpha, _ = sigmoids(tl.load(params_ptr + PARAMETER_K1) * ratio)
    if (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR) & FLAGS:
        complement, gamma = sigmoids(tl.load(params_ptr + PARAMETER_K2) * ratio)
    if FLAG_IPR_REWARD & FLAGS:
        implicit = d_w
    if FLAG_IPR_ANCHOR & FLAGS:
        implicit = anchor
    logits = half_beta * (chosen - alpha * rejected)
    preference, factor = softplus_and_slope(-logits, COMPUTE)
    return logits, preference, factor, implicit, alpha, gamma, complement, ratio, by_chosen, by_rejected


@triton.jit
def pgdpo_slopes(
    d_l,
    factor,
    alpha,
    gamma,
    complement,
    ratio,
    by_chosen,
    by_rejected,
    by_preference,
    by_implicit,
    by_gamma,
    beta_scale,
    params_ptr,
    FLAGS: tl.constexpr,
    BETA_SCALED: tl.constexpr,
):
    """Derivatives of the loss by the chosen error, the rejected error and the anchor, from those by P, I and gamma."""
    half_beta = scaled_half_beta(params_ptr, beta_scale, BETA_SCALED)
    slope = by_preference * factor * half_beta
    g_w = slope
    g_l = -slope * alpha
    g_anchor = tl.zeros_like(slope)
    if FLAG_IPR_REWARD & FLAGS:
        g_w += by_implicit
    if FLAG_IPR_ANCHOR & FLAGS:
        g_anchor += by_implicit
    if FLAG_ATTACHED & FLAGS:
        by_ratio = tl.zeros_like(slope)
        if FLAG_ARS & FLAGS:
            k1 = tl.load(params_ptr + PARAMETER_K1)
            _, beyond = sigmoids(k1 * ratio)
            by_ratio -= slope * d_l * k1 * alpha * beyond
        if (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR) & FLAGS:
            by_ratio -= tl.load(params_ptr + PARAMETER_K2) * gamma * complement * by_gamma
        g_w -= by_ratio * by_chosen
        g_l -= by_ratio * by_rejected
    return g_w, g_l, g_anchor


@triton.jit
def safeguarded(g_l, e_w, cross, batch_chosen, batch_cross, params_ptr, FLAGS: tl.constexpr):
    """The rejected derivative, scaled by Safeguarded's lambda where it asks for that: a group's own or the batch's."""
    if (FLAG_SAFEGUARD | FLAG_SAFEGUARD_BATCH) & FLAGS:
        chosen = e_w
        if FLAG_SAFEGUARD_BATCH & FLAGS:
            chosen = batch_chosen
            cross = batch_cross
        conflict = cross > 0
        bound = (1.0 - tl.load(params_ptr + PARAMETER_MU)) * chosen / tl.where(conflict, cross, 1.0)
        g_l *= tl.where(conflict, tl.minimum(tl.maximum(bound, 0.0), 1.0), 1.0)
    return g_l


@triton.constexpr_function
def of_term(packed, k, bits):
    """KIND or FLAGS of the k-th term of a sum."""
    return (packed >> k * bits) & ((1 << bits) - 1)


@triton.jit
def objective(
    e_w,
    e_l,
    d_w,
    d_l,
    anchor,
    cross,
    batch_chosen,
    batch_cross,
    posterior_scale,
    beta_scale,
    params_ptr,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    TERMS: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One block of groups through the objective, a sum of TERMS formulas.

    Returns loss, the first term's logits, alpha, gamma and importance, and the derivatives of the loss by the chosen
    error, the rejected error and the anchor (a gap and its policy error have the same derivative by the prediction, so
    they are added). batch_chosen and batch_cross, sums over the batch, are read with FLAG_SAFEGUARD_BATCH alone.
    """
    loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor = formula(
        e_w,
        e_l,
        d_w,
        d_l,
        anchor,
        cross,
        batch_chosen,
        batch_cross,
        posterior_scale,
        beta_scale,
        params_ptr,
        of_term(KIND, 0, TERM_KIND_BITS),
        of_term(FLAGS, 0, TERM_FLAG_BITS),
        BETA_SCALED,
        COMPUTE,
    )
    for k in tl.static_range(1, TERMS):
        more, _, _, _, _, more_w, more_l, more_anchor = formula(
            e_w,
            e_l,
            d_w,
            d_l,
            anchor,
            cross,
            batch_chosen,
            batch_cross,
            posterior_scale,
            beta_scale,
            params_ptr + k * PARAMETERS,
            of_term(KIND, k, TERM_KIND_BITS),
            of_term(FLAGS, k, TERM_FLAG_BITS),
            BETA_SCALED,
            COMPUTE,
        )
        loss += more
        g_w += more_w
        g_l += more_l
        g_anchor += more_anchor
    return loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor


@triton.jit
def formula(
    e_w,
    e_l,
    d_w,
    d_l,
    anchor,
    cross,
    batch_chosen,
    batch_cross,
    posterior_scale,
    beta_scale,
    params_ptr,
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,
    BETA_SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One formula of those, with its weight; returns what `objective` does."""
    half_beta = scaled_half_beta(params_ptr, beta_scale, BETA_SCALED)
    zero = tl.zeros_like(e_w)
    one = zero + 1.0
    alpha = one
    gamma = one
    importance = one
    g_anchor = zero
    if KIND == KIND_SFT:
        logits = zero
        loss = e_w
        g_w = one
        g_l = zero
    elif KIND == KIND_SLIC or KIND == KIND_HINGE:
        delta = tl.load(params_ptr + PARAMETER_DELTA)
        weight = 0.5 * tl.load(params_ptr + PARAMETER_WEIGHT)
        if KIND == KIND_SLIC:
            slope = 0.5 * one
            logits = 0.5 * (e_l - e_w)
        else:
            slope = half_beta * one
            logits = half_beta * (d_l - d_w)
        hinge = delta - logits
        active = tl.where(hinge >= 0, slope, 0.0)
        loss = tl.where(hinge < 0, 0.0, hinge) + weight * e_w
        g_w = active + weight
        g_l = -active
    elif KIND == KIND_IPO:
        target = tl.load(params_ptr + PARAMETER_TARGET)
        if BETA_SCALED:
            target = target / beta_scale
        off_target = 0.5 * (d_l - d_w) - target
        logits = half_beta * (d_l - d_w)
        loss = off_target * off_target
        g_w = -off_target
        g_l = off_target
    elif KIND == KIND_PGDPO:
        logits, preference, factor, implicit, alpha, gamma, complement, ratio, by_chosen, by_rejected = pgdpo_terms(
            e_w, d_w, d_l, anchor, beta_scale, params_ptr, FLAGS, BETA_SCALED, COMPUTE
        )
        ipr_scale = scaled_ipr(params_ptr, beta_scale, FLAGS, BETA_SCALED)
        loss = gamma * preference
        if (FLAG_IPR_REWARD | FLAG_IPR_ANCHOR) & FLAGS:
            loss += complement * (ipr_scale * implicit)
        g_w, g_l, g_anchor = pgdpo_slopes(
            d_l,
            factor,
            alpha,
            gamma,
            complement,
            ratio,
            by_chosen,
            by_rejected,
            gamma,
            complement * ipr_scale,
            preference - ipr_scale * implicit,
            beta_scale,
            params_ptr,
            FLAGS,
            BETA_SCALED,
        )
    elif KIND == KIND_DPOP:
        chosen = -d_w
        penalty = tl.load(params_ptr + PARAMETER_PENALTY)
        logits = half_beta * (chosen + d_l - penalty * tl.where(chosen > 0, 0.0, -chosen))
        loss, factor = softplus_and_slope(-logits, COMPUTE)
        slope = half_beta * factor
        g_w = slope * (1.0 + tl.where(chosen > 0, 0.0, penalty))
        g_l = -slope
    elif KIND == KIND_DPO_SHIFT:
        shift = tl.load(params_ptr + PARAMETER_SHIFT)
        alpha = shift * one
        logits = half_beta * (shift * d_l - d_w)
        loss, factor = softplus_and_slope(-logits, COMPUTE)
        slope = half_beta * factor
        g_w = slope
        g_l = -slope * shift
    else:
        smoothing = tl.load(params_ptr + PARAMETER_LABEL_SMOOTHING)
        logits = half_beta * (d_l - d_w)
        if FLAG_IMPORTANCE & FLAGS:
            raw = tl.exp(-0.5 * posterior_scale * (e_w + e_l))
            clip = tl.load(params_ptr + PARAMETER_CLIP)
            importance = tl.minimum(tl.maximum(raw, 1.0 - clip), 1.0 + clip)
            importance = tl.where(raw < tl.load(params_ptr + PARAMETER_THRESHOLD), 0.0, importance)
            if FLAG_INSIDE & FLAGS:
                logits *= importance
        # (1 - smoothing) softplus(-z) + smoothing softplus(z)
        rounding, factor = rounding_and_slope(-logits, COMPUTE)
        loss = (1.0 - smoothing) * tl.maximum(-logits, 0.0) + smoothing * tl.maximum(logits, 0.0) + rounding
        slope = half_beta * (factor - smoothing)
        if FLAG_IMPORTANCE & FLAGS:
            slope *= importance
            if not FLAG_INSIDE & FLAGS:
                loss *= importance
        g_w = slope
        g_l = -slope
    g_l = safeguarded(g_l, e_w, cross, batch_chosen, batch_cross, params_ptr, FLAGS)
    if FLAG_TERM_WEIGHT & FLAGS:
        term_weight = tl.load(params_ptr + PARAMETER_TERM_WEIGHT)
        if BETA_SCALED:
            if FLAG_TERM_WEIGHT_BETA & FLAGS:
                term_weight = term_weight * beta_scale
        loss *= term_weight
        g_w *= term_weight
        g_l *= term_weight
        g_anchor *= term_weight
    return loss, logits, alpha, gamma, importance, g_w, g_l, g_anchor
