"""What is known of the recent past: recency popularity, the baseline, and the model's recency term.

ranking     ranks candidates, and all items of a domain, by faded counts of the days before
sample      the validation users by whom both are chosen
choice      chooses the half-life of these counts on the validation split
term        adds logarithms of such counts to a model's scores, with weights by domain
full_term   ranks by it among all items
fit         fits these weights on the validation split
stored      keeps half-life and weights in the run's folder, and opens them
"""
