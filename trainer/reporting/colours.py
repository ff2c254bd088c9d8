"""Colours of the reports' pages, on light and on dark."""

# The first six are Okabe and Ito's, the others darker ones of Tol's and Brewer's sets. From the
# seventh on a second sign is added (a dash, a hatching), as no twelve colours are told apart by
# everyone.
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DARKER = ("#332288", "#882255", "#999933", "#117733", "#8C510A", "#44AA99")
DOMAINS = (*_OKABE_ITO, *_DARKER)
INK = "#1f2933"
GREY = "#8593a3"
GRID = "#e9edf1"
PAPER = "#ffffff"
RED = "#b42318"

# On a dark page; colours that are not named are good on both.
DARK_DOMAINS = {
    "#0072B2": "#3C9FDD",
    "#D55E00": "#F08030",
    "#009E73": "#27BE92",
    "#332288": "#9A8CF0",
    "#882255": "#D9669A",
    "#117733": "#57BD78",
    "#8C510A": "#C98F4E",
}
# assets/page.js puts these in the place of a figure's colours where the reader's scheme is dark.
DARK_COLOURS = DARK_DOMAINS | {
    INK: "#e4e8ec",
    GREY: "#8593a4",
    GRID: "#2b323b",
    PAPER: "#14181d",
    RED: "#ff9d91",
}
