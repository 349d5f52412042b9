"""How completions are judged: functions in users' files, tasks with verifiers, reward models."""
