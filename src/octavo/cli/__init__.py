"""The command line: ``main`` finds the verb, and each verb has a file that says what it takes and prints."""
