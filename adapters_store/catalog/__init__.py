"""The catalog's SQL, by noun. Each function works in the transaction of the session it is given."""
