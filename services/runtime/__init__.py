"""What the services share: settings, streams, artifacts, rpc, telemetry, auth, and the generated protobuf."""
