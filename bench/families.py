"""Every family's cases: a function of (quick, device) that yields functions that build a case."""

import turbo_cases

import dense_cases
import gdn_cases
import lexico_cases

FAMILIES = {
    "turbo": turbo_cases.turbo,
    "gdn": gdn_cases.gdn,
    "lexico": lexico_cases.lexico,
    "dense": dense_cases.dense,
}
