"""Federated rounds over a network, through Flower: the one door to it. Needs `evertune[federated]`.

files.py   what a server's and a client's file may say      apps.py   the two apps that Flower runs
launch.py  Flower's processes, quiet and closed
"""
